"""Adapters (LoRA) on chosen text layers: ``lora train``, ``lora eval``."""

import argparse
import json
from dataclasses import replace

from textloc_utils.cli import options
from textloc_utils.settings import TextlocError

#: Options of ``lora train`` that set the fields of the same name of ``lora.Training``.
TRAINING = {
    "rank": (options.whole(1, 1024), "rank of the adapters"),
    "steps": (options.whole(1, 10_000_000), "training steps"),
    "batch": (options.whole(1, 4096), "pictures per step, over all processes"),
    "lr": (options.number(0, 1, above=True), "learning rate"),
}


def add(commands) -> None:
    """Add this group's commands."""
    actions = commands.add_parser("lora", help="adapters on chosen text layers: train, measure")
    actions = actions.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_train(actions)
    _add_eval(actions)


def add_chosen_layers(command: argparse.ArgumentParser) -> None:
    """Layers by name or number; :func:`layers_of` finds them."""
    command.add_argument(
        "--layers",
        type=_layer,
        nargs="+",
        metavar="L",
        default=["localized"],
        help="localized (by the published search; default), all, random (as many others), or numbers",
    )


def _layer(text: str) -> str | int:
    if text in ("localized", "all", "random"):
        return text
    try:
        return options.layer(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"localized, all, random, or numbers are needed, got {text!r}") from None


def check_layers(asked: list) -> None:
    """Raise TextlocError for a name among numbers, or more than one name."""
    if len(asked) > 1 and any(isinstance(layer, str) for layer in asked):
        given = " ".join(map(str, asked))
        raise TextlocError(f"--layers takes localized, all, random, or numbers; got {given}")


def layers_of(model, asked: list, seed: int) -> tuple[int, ...]:
    """Text layers by number, ``all``, ``localized`` or ``random`` (as many as are localized, drawn from the others)."""
    from textloc_utils import sites
    from textloc_utils.experiment import known_layers

    if asked == ["all"]:
        return tuple(range(len(model.layers)))
    if asked not in (["localized"], ["random"]):
        return tuple(sorted(set(asked)))
    layers = known_layers(model)
    return layers if asked == ["localized"] else sites.random_layers(model, layers, seed)


def _add_train(actions) -> None:
    train = actions.add_parser(
        "train",
        help="train an adapter; started again, it resumes",
        description="Train an adapter (LoRA) and save it as a diffusers file. A killed run goes on where its last "
        "checkpoint was. Several processes share the batch: accelerate launch -m textloc_utils.cli lora train MODEL",
    )
    options.add_model(train)
    add_chosen_layers(train)
    train.add_argument("--self-attention", action="store_true", help="and all attention of the picture to itself")
    train.add_argument(
        "--data",
        type=options.path,
        metavar="DIR",
        help="pictures, and their captions in metadata.csv with columns file_name and text (default: drawn scenes "
        "of one typeface and one material)",
    )
    for name, (kind, text) in TRAINING.items():
        train.add_argument(f"--{name}", type=kind, metavar="N", help=text)
    options.add_seed(train, "of the adapter's start, batches and noise", 0)
    train.add_argument("--out", required=True, type=options.folder, metavar="DIR", help="folder of the adapter")
    train.set_defaults(run=_train)


def _train(args) -> None:
    check_layers(args.layers)
    from textloc_utils import lora, lora_looks, models

    spec = models.spec(args.model)
    options.check_model_path(args.model_path, spec)
    given = {name: getattr(args, name) for name in TRAINING if getattr(args, name) is not None}
    training = lora.Training(layers=(), self_attention=args.self_attention, seed=args.seed, **given)
    if args.data is not None:
        pictures = lora.load_folder(args.data, spec.height, spec.width)
    elif spec.miniature:
        pictures = lora_looks.drawn_scenes(lora_looks.SCENES)
    else:
        raise TextlocError(f"{args.model} needs --data DIR: the default task is drawn at the miniatures' size")
    vars(args).pop("steps")  # the training's own, not the sampler's
    model = options.loaded(args, spec)
    training = replace(training, layers=layers_of(model, args.layers, args.seed))
    lora.targets(model, training)
    report = lora.train(model, lora.prepare(model, *pictures), training, folder=args.out, progress=options.progress())
    if options.rank() == 0:
        chosen = " ".join(map(str, training.layers))
        print(f"{args.out / lora.FILE}: layers {chosen}, {report.parameters:,} parameters")
        print(f"{report.seconds_per_step:.3f} s per step, {report.saved_bytes / 2**20:.1f} MiB kept for the gradient")


def _add_eval(actions) -> None:
    evaluate = actions.add_parser("eval", help="spelling before and after, and what drifted")
    options.add_model(evaluate)
    evaluate.add_argument(
        "--adapter", required=True, type=options.path, metavar="DIR", help="the --out of `textloc lora train`"
    )
    evaluate.add_argument("--words", type=options.count, default=100, metavar="N", help="test words (default: 100)")
    options.add_seed(evaluate)
    options.add_json(evaluate, "a list of two objects")
    evaluate.set_defaults(run=_eval)


def _eval(args) -> None:
    from textloc_utils import lora, lora_looks, ocr

    lora.check_adapter(args.adapter)
    lora_looks.asked_words("report", args.words, args.seed)
    spec = options.spec_of(args)
    reader = ocr.check_reader(spec.height)
    run = options.experiment(args, options.loaded(args, spec))
    table = lora_looks.evaluate(run, args.adapter, args.words, args.seed)
    if args.json:
        print(json.dumps(table.to_dict("records"), indent=1))
        return
    shown = table[["arm", *(name for name in table if name != "arm")]]
    print(shown.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    print(f"read by {reader}")
