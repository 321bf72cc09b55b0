"""The book's measurements, ``study ...``: layers, contents, trainings, edit, toxic, looks.

Each unit of work is stored, so a killed run resumes where it stopped.
"""

from pathlib import Path

from textloc_utils.cli import options
from textloc_utils.settings import preset

#: Names of the studies of ``layer_contents`` and of ``edit.study.TABLES``, without importing them.
CONTENTS, EDITS = ("steps", "parts", "length", "tokens", "heads"), ("open", "named", "open_given")


def add(commands) -> None:
    """Add this group's commands."""
    studies = commands.add_parser("study", help="make the book's measurements; a killed run resumes where it stopped")
    studies = studies.add_subparsers(dest="study", required=True, metavar="STUDY")
    for each in (_add_layers, _add_contents, _add_trainings, _add_edit, _add_toxic, _add_looks):
        each(studies)


def _measurement(studies, name: str, run, what: str, work: str, publish: str = "the table"):
    """Add a measurement of one model, with the options of all measurements. At its end, the reader is printed."""

    def measure(args) -> None:
        run(args)
        print(f"read by {args.reader}")

    command = studies.add_parser(name, help=what)
    options.add_model(command)
    options.add_preset(command, work)
    options.add_seed(command)
    options.add_publish(command, publish)
    command.set_defaults(run=measure)
    return command


def _add_layers(studies) -> None:
    what = (
        "find the layers that hold the text, with every search, and those of the other factors of a miniature's scenes"
    )
    _measurement(studies, "layers", _layers, what, "number of pairs and steps", "the tables")


def _layers(args) -> None:
    from textloc_utils import scene_pairs, specificity

    work, model = preset(args.preset), _model(args)
    run = options.experiment(args, model, steps=work.steps)
    n, reported = work.sweep_pairs, work.words
    searched = specificity.searches(run, n, args.seed)
    for how, found in searched.items():
        print(f"{how}: {found}")
    sets = {"text": searched["exhaustive"].layers}
    print(specificity.rates(specificity.needed(run, sets["text"], reported, args.seed)).round(3).to_string(index=False))
    if scene_pairs.world_of(model) is None:
        return  # there is no reader for the other factors of such pictures
    sets |= specificity.found_sets(run, work.pairs, args.seed)
    for factor in scene_pairs.FACTORS:
        layers = sets.get(factor)
        told = "all layers together bring it too rarely" if layers is None else f"layers {layers}"
        print(f"{factor}: {told}")
    specificity.alone(run, work.pairs, args.seed)
    for table, short in (
        (specificity.reported(run, sets, reported, args.seed), specificity.rates),
        (specificity.carried(run, sets["text"], reported, args.seed), specificity.moved),
    ):
        print(short(table).round(3).to_string(index=False))


def _add_contents(studies) -> None:
    what = "measure what the localized layers carry: steps, heads, keys, values, tokens, length"
    contents = _measurement(studies, "contents", _contents, what, "number of pairs and steps", "the tables")
    contents.add_argument("--tables", nargs="+", choices=CONTENTS, help="the tables to make (default: all)")
    options.add_layers(contents)


def _contents(args) -> None:
    from textloc_utils import layer_contents, sweeps

    run, work, layers = _experiment(args)
    for name in args.tables or CONTENTS:
        print(f"{name}, layers {' '.join(map(str, layers))}")
        if name == "heads":
            table = layer_contents.heads(run, layers, work.pairs, args.seed)
            print(layer_contents.rates(table).round(3).to_string(index=False))
            continue
        table = layer_contents.study(run, name, layers, work.pairs, args.seed)
        _print_effects(sweeps.effect_intervals(table))


def _add_trainings(studies) -> None:
    trainings = studies.add_parser(
        "trainings",
        help="search the layers of a miniature's other trainings, also of those with planted layers",
        description="Search the layers of miniatures that were trained in the plain world with other seeds, with other "
        "depths, or with planted layers. The tables are published.",
    )
    trainings.add_argument("model", metavar="MODEL", help="a miniature, like sd3-mini")
    trainings.add_argument(
        "runs",
        nargs="+",
        type=options.path,
        metavar="DIR",
        help="a folder that `textloc train MODEL --world plain --ship DIR` wrote",
    )
    options.add_preset(trainings, "number of pairs")
    options.add_seed(trainings)
    trainings.set_defaults(run=_trainings)


def _trainings(args) -> None:
    from textloc_utils import models, ocr, trainings

    reader = ocr.check_reader(models.spec(args.model).height)
    runs, n = [Path(run) for run in args.runs], preset(args.preset).pairs
    table = trainings.publish(args.model, runs, n, args.seed, progress=options.progress())
    print(table.round(3).to_string(index=False))
    print(f"read by {reader}")


def _add_edit(studies) -> None:
    what = "compare editing with its baselines, each with its best setting, also on given pictures"
    edit = _measurement(studies, "edit", _edit, what, "number of pairs, noises and steps", "the tables")
    edit.add_argument("--tables", nargs="+", choices=EDITS, help="the tables to make (default: all)")
    edit.add_argument(
        "--pairs", type=options.count, metavar="N", help="number of pairs of each table (default: the preset's)"
    )
    options.add_noises(edit, None)
    options.add_layers(edit)


def _edit(args) -> None:
    from textloc_utils import edit

    run, work, layers = _experiment(args)
    noises = args.noises or work.noises
    for name in args.tables or EDITS:
        print(f"{name}, layers {' '.join(map(str, layers))}")
        n = args.pairs or edit.pairs_of(work)[name]
        table = edit.table(run, name, layers, n, args.seed, noises=1 if edit.TABLES[name][1] else noises)
        print(edit.kept(table).round(3).to_string(index=False))


def _add_toxic(studies) -> None:
    what = "compare the guard with its baselines and a safe adapter, on toxic words that decide the scene's material"
    toxic = _measurement(studies, "toxic", _toxic, what, "number of prompts, noises and steps", "the tables")
    options.add_noises(toxic, None)
    options.add_layers(toxic)


def _toxic(args) -> None:
    from textloc_utils.safety import study

    run, work, layers = _experiment(args)
    asked = {"layers": layers, "training": study.shared(work.steps), "noises": args.noises or work.noises}
    table = study.measure(run, work.words, args.seed, **asked)
    columns = ["method", "learned", "n", "toxic", "exact", "material_kept", "ssim_outside", "extra"]
    for kind, part in table.groupby("kind", sort=False):
        print(kind)
        rates = study.rates(part, ["method", "learned"])
        print(rates[[name for name in columns if name in rates]].round(3).to_string(index=False))


def _add_looks(studies) -> None:
    what = "tune adapters on one look, from the early checkpoint, and compare the gain in spelling with the drift"
    options.add_layers(_measurement(studies, "looks", _looks, what, "number of words and steps", "the tables"))


def _looks(args) -> None:
    from textloc_utils import lora_looks

    run, work, layers = _experiment(args)
    table = lora_looks.study(run, layers, work.words, args.seed, training=lora_looks.shared(work.steps))
    columns = ["arm", "lr", "seeds", *lora_looks.GAINS, *lora_looks.DRIFTS]
    print(lora_looks.plane(table)[columns].to_string(index=False, float_format=lambda value: f"{value:.3f}"))


def _model(args):
    """Load the model, after a check of its reader. The reader's name is printed at the end."""
    from textloc_utils import ocr

    spec = options.spec_of(args)
    args.reader = ocr.check_reader(spec.height)
    return options.loaded(args, spec)


def _experiment(args):
    """The experiment, its preset, and the localized layers."""
    from textloc_utils.experiment import known_layers

    work, model = preset(args.preset), _model(args)
    return options.experiment(args, model, steps=work.steps), work, args.layers or known_layers(model)


def _print_effects(table) -> None:
    for row in table.itertuples():
        print(f"  {row.site:<24} {row.mean:6.2f} [{row.low:.2f}, {row.high:.2f}]")
