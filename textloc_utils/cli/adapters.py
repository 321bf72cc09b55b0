"""Adapters (LoRA) on chosen text layers: ``lora train``, ``lora eval``."""

import argparse
import json
from dataclasses import replace

from textloc_utils.cli import options
from textloc_utils.settings import TextlocError

#: Options of ``lora train`` that set the fields of ``lora.Training`` with the same name.
TRAINING = {
    "rank": (options.whole(1, 1024), "rank of the adapters"),
    "steps": (options.whole(1, 10_000_000), "training steps"),
    "batch": (options.whole(1, 4096), "pictures per step, summed over all processes"),
    "lr": (options.number(0, 1, above=True), "learning rate"),
}


def add(commands) -> None:
    """Add this group's commands."""
    actions = commands.add_parser("lora", help="train and measure adapters on chosen text layers")
    actions = actions.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_train(actions)
    _add_eval(actions)


def add_chosen_layers(command: argparse.ArgumentParser) -> None:
    """Add the option for layers by name or number. :func:`layers_of` finds the layers."""
    command.add_argument(
        "--layers",
        type=_layer,
        nargs="+",
        metavar="L",
        default=["localized"],
        help="localized (from the published search; default), all, random (equally many other layers), or numbers",
    )


def _layer(text: str) -> str | int:
    if text in ("localized", "all", "random"):
        return text
    try:
        return options.layer(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"localized, all, random, or numbers are needed, got {text!r}") from None


def check_layers(asked: list) -> None:
    """Raise TextlocError for a mix of names and numbers, or for more than one name."""
    if len(asked) > 1 and any(isinstance(layer, str) for layer in asked):
        given = " ".join(map(str, asked))
        raise TextlocError(f"--layers takes localized, all, random, or numbers; got {given}")


def layers_of(model, asked: list, seed: int) -> tuple[int, ...]:
    """Text layers by number, ``all``, ``localized`` or ``random`` (as many as are localized, from the other layers)."""
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
        help="train an adapter; a run that is started again resumes",
        description="Train an adapter (LoRA) and save it as a diffusers file. A killed run resumes from its last "
        "checkpoint. Several processes can share the batch: accelerate launch -m textloc_utils.cli lora train MODEL",
    )
    options.add_model(train)
    add_chosen_layers(train)
    train.add_argument("--self-attention", action="store_true", help="also adapt the picture's self-attention")
    train.add_argument(
        "--data",
        type=options.path,
        metavar="DIR",
        help="folder of pictures, with captions in metadata.csv (columns file_name and text); default: rendered "
        "scenes with one typeface and one material",
    )
    for name, (kind, text) in TRAINING.items():
        train.add_argument(f"--{name}", type=kind, metavar="N", help=text)
    options.add_seed(train, "seed of the adapter's initial weights, the batches and the noise", 0)
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
        raise TextlocError(f"{args.model} needs --data DIR: the default pictures have the miniatures' size")
    vars(args).pop("steps")  # these are steps of the training, not of the sampler
    model = options.loaded(args, spec)
    training = replace(training, layers=layers_of(model, args.layers, args.seed))
    lora.targets(model, training)
    report = lora.train(model, lora.prepare(model, *pictures), training, folder=args.out, progress=options.progress())
    if options.rank() == 0:
        chosen = " ".join(map(str, training.layers))
        print(f"{args.out / lora.FILE}: layers {chosen}, {report.parameters:,} parameters")
        print(
            f"{report.seconds_per_step:.3f} s per step, {report.saved_bytes / 2**20:.1f} MiB kept for the backward pass"
        )


def _add_eval(actions) -> None:
    evaluate = actions.add_parser("eval", help="measure spelling and drift without and with an adapter")
    options.add_model(evaluate)
    evaluate.add_argument(
        "--adapter",
        required=True,
        type=options.path,
        metavar="DIR",
        help="the folder given as --out to `textloc lora train`",
    )
    evaluate.add_argument(
        "--words", type=options.count, default=100, metavar="N", help="number of test words (default: 100)"
    )
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
