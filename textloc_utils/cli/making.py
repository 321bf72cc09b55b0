"""What the book is made of: ``train`` (a miniature), ``explore`` (the layer explorer's pictures)."""

import json
from dataclasses import replace

from textloc_utils.cli import options
from textloc_utils.settings import TextlocError, data_dir

#: Options of ``train`` that set the budget's fields of the same name.
BUDGET = {
    "samples": (options.whole(1, 10**12), "stop after this many training pictures"),
    "autoencoder_steps": (options.whole(1, 10**9), "training steps of the autoencoder, before"),
    "encoder_steps": (options.whole(1, 10**9), "training steps of each text encoder, before"),
    "pool": (options.whole(2, 10**9), "scenes encoded once, before"),
    "batch": (options.whole(1, 10**6), "pictures per step, over all processes"),
    "lr": (options.number(0, 1, above=True), "learning rate"),
    "evaluations": (options.whole(0, 10**6), "how often spelling and patch effects are measured, at least"),
    "pairs": (options.whole(1, 10**4), "pairs on which the patch effects are measured"),
}


def add(commands) -> None:
    """Add this group's commands."""
    _add_train(commands)
    _add_explore(commands)


def _add_train(commands) -> None:
    train = commands.add_parser(
        "train",
        help="train a miniature from scratch; started again, it resumes",
        description="Train a miniature from scratch. A killed run goes on where its last checkpoint was. Two processes "
        "with one thread each: OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 -m textloc_utils.cli train NAME",
    )
    train.add_argument("name", metavar="NAME", help="a miniature, like sd3-mini")
    train.add_argument("--out", type=options.folder, metavar="DIR", help="folder of the run (default: data/runs/NAME)")
    for name, (kind, text) in BUDGET.items():
        train.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=text)
    train.add_argument("--seed", type=options.whole(0, 2**31 - 1), default=0)
    train.add_argument(
        "--ship", type=options.folder, metavar="DIR", help="folder of the miniature (default: data/miniatures/NAME)"
    )
    train.add_argument("--no-ship", action="store_true", help="train only: a run for a study")
    train.add_argument(
        "--parts",
        type=options.folder,
        metavar="DIR",
        help="folder of the autoencoders and text encoders that runs share (default: data/runs/parts)",
    )
    train.add_argument(
        "--world",
        default="second",
        choices=["second", "plain"],
        help="plain: one wall, one typeface, words at the left",
    )
    train.add_argument("--layers", type=options.whole(1, 100), metavar="N", help="blocks of sd3-mini (default: 12)")
    train.add_argument(
        "--seeing", type=options.layer, nargs="+", metavar="I", help="the only text layers that may see the letters"
    )
    train.add_argument(
        "--text",
        choices=["subwords", "random"],
        help="text encoders whose tokens hold several letters, or that never learned (default: letters, learned)",
    )
    train.add_argument(
        "--precision",
        default="auto",
        choices=["auto", "fp32", "bf16"],
        help="auto: bf16 where the device computes in it",
    )
    train.add_argument(
        "--compile", action="store_true", help="compile the denoiser first: minutes to begin with, then faster steps"
    )
    options.add_place(train)
    train.set_defaults(run=_train)


def _train(args) -> None:
    from textloc_utils.miniatures import card, training, world

    if args.ship and args.no_ship:
        raise TextlocError("give --ship or --no-ship, not both")
    study = (args.layers, args.seeing, args.text) != (None, None, None) or args.world != "second"
    if study and not (args.ship or args.no_ship):
        raise TextlocError("a run for a study is no miniature of the book; add --no-ship, or name a folder with --ship")
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
    if report is not None and destination is not None:  # the main process
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
