"""The book's notebooks: ``run``, ``strip``."""

import sys

from textloc_utils.cli import options
from textloc_utils.settings import PRESETS


def add(commands) -> None:
    """Add this group's commands."""
    _add_run(commands)
    _add_strip(commands)


def _add_run(commands) -> None:
    run = commands.add_parser(
        "run",
        help="execute the book's notebooks, those that are out of date",
        description="Execute notebooks with papermill, in place, or with other parameters into a folder. A notebook is "
        "replaced only after it ran through, and left alone where nothing changed; a killed run goes on where it was.",
    )
    run.add_argument(
        "notebooks", type=options.path, metavar="NOTEBOOK", nargs="*", help="notebook files (default: all of the book)"
    )
    run.add_argument(
        "--models", nargs="+", metavar="MODEL", help="names from `textloc models` (default: the notebook's)"
    )
    run.add_argument("--preset", choices=PRESETS, help="how much to run (default: the notebook's)")
    run.add_argument("--seed", type=options.seed, help="draws words, colours and noise (default: the notebook's)")
    run.add_argument(
        "--out", type=options.folder, metavar="DIR", help="folder for the results; needed with other parameters"
    )
    run.add_argument(
        "--jobs", type=options.whole(1, 256), metavar="N", help="notebooks at a time (default: one per core, at most 4)"
    )
    run.add_argument(
        "--timeout",
        type=options.whole(1, 10_000_000),
        default=1800,
        metavar="SECONDS",
        help="for one cell (default: 1800)",
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
    planned = notebooks.plan(args.notebooks, parameters, args.out)
    executed = notebooks.execute(planned, jobs=args.jobs, timeout=args.timeout, progress=sys.stderr.isatty())
    current = len(planned) - len(executed)
    print(f"{len(executed)} notebooks executed, {current} up to date" if executed else f"all {current} are up to date")


def _add_strip(commands) -> None:
    strip = commands.add_parser(
        "strip",
        help="take out of executed notebooks what differs from run to run",
        description="What `textloc run` does after papermill: times and papermill's notes go, and what a cell printed "
        "becomes one output. Two runs of a notebook then give the same bytes.",
    )
    strip.add_argument(
        "notebooks", type=options.path, metavar="NOTEBOOK", nargs="+", help="notebook files, changed in place"
    )
    strip.set_defaults(run=_strip)


def _strip(args) -> None:
    from textloc_utils.book import notebooks

    for path in args.notebooks:
        notebooks.read(path)  # none is changed where another is no notebook
    for path in args.notebooks:
        notebooks.strip(path)
