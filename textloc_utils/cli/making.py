"""Commands that make parts of the book: ``train`` (a miniature), ``explore`` (the layer explorer's pictures)."""

import json
from dataclasses import replace

from textloc_utils.cli import options
from textloc_utils.settings import TextlocError, data_dir

#: Options of ``train`` that set the fields of the budget with the same name.
BUDGET = {
    "samples": (options.whole(1, 10**12), "stop after this many training pictures"),
    "autoencoder_steps": (options.whole(1, 10**9), "training steps of the autoencoder, before the denoiser's training"),
    "encoder_steps": (options.whole(1, 10**9), "training steps of each text encoder, before the denoiser's training"),
    "pool": (options.whole(2, 10**9), "number of scenes that are encoded once, before the denoiser's training"),
    "batch": (options.whole(1, 10**6), "pictures per step, summed over all processes"),
    "lr": (options.number(0, 1, above=True), "learning rate"),
    "evaluations": (options.whole(0, 10**6), "least number of measurements of spelling and patch effects"),
    "pairs": (options.whole(1, 10**4), "number of pairs on which the patch effects are measured"),
}


def add(commands) -> None:
    """Add this group's commands."""
    _add_train(commands)
    _add_explore(commands)


def _add_train(commands) -> None:
    train = commands.add_parser(
        "train",
        help="train a miniature from scratch; a run that is started again resumes",
        description="Train a miniature from scratch. A killed run resumes from its last checkpoint. To use two "
        "processes with one thread each: OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 -m textloc_utils.cli train NAME",
    )
    train.add_argument("name", metavar="NAME", help="a miniature, like sd3-mini")
    train.add_argument("--out", type=options.folder, metavar="DIR", help="folder of the run (default: data/runs/NAME)")
    for name, (kind, text) in BUDGET.items():
        train.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=text)
    train.add_argument("--seed", type=options.whole(0, 2**31 - 1), default=0)
    train.add_argument(
        "--ship", type=options.folder, metavar="DIR", help="folder of the miniature (default: data/miniatures/NAME)"
    )
    train.add_argument("--no-ship", action="store_true", help="only train, for a study; write no miniature")
    train.add_argument(
        "--parts",
        type=options.folder,
        metavar="DIR",
        help="folder of autoencoders and text encoders that several runs share (default: data/runs/parts)",
    )
    train.add_argument(
        "--world",
        default="second",
        choices=["second", "plain"],
        help="kind of scenes; plain has one wall and one typeface, and words start at the left (default: second)",
    )
    train.add_argument(
        "--layers", type=options.whole(1, 100), metavar="N", help="number of blocks of sd3-mini (default: 12)"
    )
    train.add_argument(
        "--seeing", type=options.layer, nargs="+", metavar="I", help="the only text layers that may see the letters"
    )
    train.add_argument(
        "--text",
        choices=["subwords", "random"],
        help="subwords: tokens hold several letters; random: the text encoders are not trained (default: trained text "
        "encoders with one letter per token)",
    )
    train.add_argument(
        "--precision",
        default="auto",
        choices=["auto", "fp32", "bf16"],
        help="number format of the training; auto means bf16 if the device supports it (default: auto)",
    )
    train.add_argument(
        "--compile",
        action="store_true",
        help="compile the denoiser first, which takes minutes but makes the steps faster",
    )
    options.add_place(train)
    train.set_defaults(run=_train)


def _train(args) -> None:
    from textloc_utils.miniatures import card, training, world

    if args.ship and args.no_ship:
        raise TextlocError("give --ship or --no-ship, not both")
    study = (args.layers, args.seeing, args.text) != (None, None, None) or args.world != "second"
    if study and not (args.ship or args.no_ship):
        raise TextlocError(
            "a run for a study is not a miniature of the book; add --no-ship, or give a folder to --ship"
        )
    given = {k: getattr(args, k) for k in BUDGET if getattr(args, k) is not None}
    budget = replace(training.default_budget(args.name), **given)
    folder = args.out or options.folder(str(data_dir() / "runs" / args.name))
    destination = None if args.no_ship else card.check_destination(args.ship or data_dir() / "miniatures" / args.name)
    report = training.train(
        args.name,
        folder,
        budget=budget,
        seed=args.seed,
        only=world.WORLDS[args.world],
        layers=args.layers,
        seeing=args.seeing and tuple(args.seeing),
        text=args.text,
        cache=args.parts,
        device=args.device,
        precision=args.precision,
        compiled=args.compile,
    )
    if report is not None and destination is not None:  # in the main process
        shipped = card.export(args.name, folder, destination)
        print(json.dumps(shipped["trained"]))


def _add_explore(commands) -> None:
    explore = commands.add_parser("explore", help="draw the pictures of the book's layer explorer into the data folder")
    explore.add_argument("models", metavar="MODEL", nargs="+", help="names from `textloc models`")
    explore.add_argument("--pairs", type=options.count, default=6, metavar="N", help="number of pairs (default: 6)")
    options.add_seed(explore)
    options.add_place(explore)
    explore.set_defaults(run=_explore)


def _explore(args) -> None:
    from textloc_utils import models, ocr, scene_pairs
    from textloc_utils.book import explorer

    for spec in [models.spec(name) for name in args.models]:
        ocr.check_reader(spec.height)
    for model in [models.load(name, device=args.device) for name in args.models]:
        pairs = scene_pairs.for_model(model, args.pairs, "report", args.seed)
        table = explorer.publish(options.experiment(args, model), pairs)
        print(f"{model.spec.name}: {len(table)} pictures of {len(pairs)} pairs in {explorer.store().root}")
