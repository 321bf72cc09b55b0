"""Commands for the book's notebooks: ``run``, ``strip``."""

import shutil
import sys

from textloc_utils import files
from textloc_utils.cli import options
from textloc_utils.settings import PRESETS, TextlocError


def add(commands) -> None:
    """Add this group's commands."""
    _add_run(commands)
    _add_strip(commands)


def _add_run(commands) -> None:
    run = commands.add_parser(
        "run",
        help="execute those of the book's notebooks that are out of date",
        description="Execute notebooks with papermill. They are executed in place, or with other parameters into a "
        "folder. A notebook is replaced only after it was executed completely, and only if something changed. A killed "
        "run resumes where it stopped.",
    )
    run.add_argument(
        "notebooks",
        type=options.path,
        metavar="NOTEBOOK",
        nargs="*",
        help="notebook files (default: all notebooks of the book)",
    )
    run.add_argument(
        "--models", nargs="+", metavar="MODEL", help="names from `textloc models` (default: those of the notebook)"
    )
    run.add_argument("--preset", choices=PRESETS, help="amount of work (default: that of the notebook)")
    run.add_argument(
        "--seed", type=options.seed, help="seed for words, colours and noise (default: that of the notebook)"
    )
    run.add_argument(
        "--out",
        type=options.folder,
        metavar="DIR",
        help="folder for the executed notebooks; required with other parameters",
    )
    run.add_argument(
        "--jobs",
        type=options.whole(1, 256),
        metavar="N",
        help="number of notebooks that run in parallel (default: one per core, at most 4)",
    )
    run.add_argument(
        "--timeout",
        type=options.whole(1, 10_000_000),
        default=1800,
        metavar="SECONDS",
        help="time limit for one cell (default: 1800)",
    )
    run.add_argument(
        "--estimate",
        action="store_true",
        help="execute with the preset smoke, print how long the chosen preset would take here, and keep no results",
    )
    run.add_argument(
        "--summary",
        type=options.file,
        metavar="FILE",
        help="write a Markdown file that lists the executed notebooks and the recorded numbers that changed",
    )
    run.add_argument(
        "--publish",
        action="store_true",
        help="write the time of each notebook to the package's data (only in place, with the notebooks' parameters)",
    )
    run.set_defaults(run=_run)


def _run(args) -> None:
    from textloc_utils.book import notebooks

    parameters = {}
    if args.models:
        from textloc_utils import models

        parameters["MODELS"] = " ".join(models.spec(name).name for name in args.models)
    if args.preset:
        parameters["PRESET"] = args.preset
    if args.seed is not None:
        parameters["SEED"] = args.seed
    if args.publish and (parameters or args.out):
        raise TextlocError("--publish is for notebooks with their own parameters: omit --out and other parameters")
    if args.estimate and (args.publish or args.summary):
        raise TextlocError("--estimate keeps no results: omit --publish and --summary")
    how = {"jobs": args.jobs, "timeout": args.timeout, "progress": sys.stderr.isatty()}
    if args.estimate:
        _estimate(notebooks.plan(args.notebooks, parameters, args.out or "executed"), args, how)
        return
    planned = notebooks.plan(args.notebooks, parameters, args.out)
    plain = not (args.summary or args.publish)
    executed = notebooks.execute(planned, **how) if plain else _told(planned, args, how)
    current = len(planned) - len(executed)
    print(f"{len(executed)} notebooks executed, {current} up to date" if executed else f"all {current} are up to date")


def _told(planned, args, how: dict) -> list:
    """Execute, and write what the options ask for. This is not in :func:`_run`, because its imports take seconds."""
    from textloc_utils.book import notebooks, reports

    before = {e.out: reports.recorded(e.out if e.out.is_file() else e.source) for e in planned}
    executed = notebooks.execute(planned, **how)
    if args.summary:
        files.write_text(args.summary, reports.summary(executed, before))
    if args.publish:
        reports.publish_times(planned)
    return executed


def _estimate(planned, args, how: dict) -> None:
    from textloc_utils import models, settings
    from textloc_utils.book import reports

    steps = [models.spec(name).steps for name in args.models or models.MINIATURES]
    found = reports.estimate(planned, max(steps), **how)
    for e in found:
        print(
            f"{e.notebook}: about {e.seconds / 3600:.1f} h (smoke took {e.smoke:.0f} s, {e.units:.0f} s of them in "
            f"units of work; its peak of memory: {e.peak})"
        )
    hours, free = sum(e.seconds for e in found) / 3600, shutil.disk_usage(settings.ROOT).free / 2**30
    print(f"all: about {hours:.1f} h, one notebook after the other; free disk {free:.0f} GiB")


def _add_strip(commands) -> None:
    strip = commands.add_parser(
        "strip",
        help="remove from executed notebooks everything that differs from run to run",
        description="Do what `textloc run` does after papermill: remove times and papermill's notes, and join the "
        "printed lines of a cell to one output. Then two runs of a notebook give the same bytes.",
    )
    strip.add_argument(
        "notebooks", type=options.path, metavar="NOTEBOOK", nargs="+", help="notebook files, changed in place"
    )
    strip.set_defaults(run=_strip)


def _strip(args) -> None:
    from textloc_utils.book import notebooks

    for path in args.notebooks:
        notebooks.read(path)  # if one of the files is not a notebook, no file is changed
    for path in args.notebooks:
        notebooks.strip(path)
