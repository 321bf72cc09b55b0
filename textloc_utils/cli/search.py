"""Search for the layers that hold the text: ``localize``."""

import json
from dataclasses import asdict

from textloc_utils.cli import options
from textloc_utils.settings import TextlocError, preset


def add(commands) -> None:
    """Add this group's command."""
    localize = commands.add_parser(
        "localize",
        help="find the layers that hold the text",
        description="Find the layers that hold the text. The result of each pair is stored, so a killed run resumes "
        "where it stopped. Several processes or GPUs can share the pairs: accelerate launch -m textloc_utils.cli "
        "localize MODEL",
    )
    options.add_model(localize)
    localize.add_argument(
        "--search",
        default="budgeted",
        choices=["exhaustive", "budgeted", "one-step", "attribution", "attention"],
        help="exhaustive patches every layer in every pair; budgeted finds the set at a fraction of this cost; "
        "one-step and attribution draw no pictures; attention is a baseline without patching (default: budgeted)",
    )
    options.add_preset(localize, "number of pairs, set of prompts, and number of steps")
    localize.add_argument("--pairs", type=options.count, metavar="N", help="number of pairs (default: the preset's)")
    localize.add_argument(
        "--prompts",
        type=options.path,
        metavar="SET",
        help=f"{', '.join(options.SETS)}, or a text file with one prompt per line (default: the preset's)",
    )
    options.add_seed(localize)
    options.add_noises(localize)
    options.add_drawing(localize)
    localize.add_argument(
        "--by",
        default="score",
        choices=["score", "exact"],
        help="how sets are compared: by the score of the target's letters, or by the share of exact words, as in the "
        "book's chapters; only for searches that draw pictures (default: score)",
    )
    localize.add_argument(
        "--reach",
        type=options.number(0, 1, above=True),
        default=0.9,
        help="share of the all-layer patch's effect that the set must reach (default: 0.9)",
    )
    localize.add_argument(
        "--budget",
        type=options.number(0, 1, above=True),
        default=0.1,
        help="limit of the cost of --search budgeted, as a share of the exhaustive sweep's cost; one round is always "
        "done (default: 0.1)",
    )
    options.add_json(localize, "an object")
    options.add_publish(localize, "the outcome")
    localize.set_defaults(run=_localize)


def _pairs(args) -> list:
    """The pairs for the search: from the preset's sets in equal parts, from one set, or from a file."""
    from textloc_utils import localization, prompts

    work = preset(args.preset)
    # A published table is for the book. The book uses more pairs for searches with pictures than for those without.
    drawn = args.publish and args.search not in localization.WITHOUT_PICTURES
    n = args.pairs or (work.sweep_pairs if drawn else work.pairs)
    if args.prompts is not None and args.prompts not in options.SETS:
        chosen = prompts.load_pairs(args.prompts, n, args.seed)
    else:
        chosen = prompts.pairs_of(work.sets if args.prompts is None else (args.prompts,), n, args.seed)
    return prompts.with_noises(chosen, args.noises)


def _localize(args) -> None:
    from textloc_utils import localization, ocr

    if args.publish and args.noises > 1:
        raise TextlocError("a published table has only one noise per pair; omit --noises or --publish")
    if args.by == "exact" and args.search in localization.WITHOUT_PICTURES:
        raise TextlocError(f"--by exact needs pictures, which --search {args.search} does not draw")
    chosen, work = _pairs(args), preset(args.preset)
    spec = options.spec_of(args)
    reader = ocr.check_reader(spec.height, [text for pair in chosen for text in (pair.source_text, pair.target_text)])
    model = options.loaded(args, spec)
    run = options.experiment(args, model, steps=work.steps)
    found = localization.localize(run, chosen, how=args.search, share=args.reach, budget=args.budget, by=args.by)
    if options.rank():
        return
    if args.json:
        print(json.dumps(asdict(found) | {"reader": reader}, indent=1))
        return
    for layer, effect in enumerate(found.effects):
        mark = "*" if layer in found.layers else " "
        print(f"{mark} {layer:>3}  {effect:6.2f}  {'#' * round(40 * max(0.0, effect))}")
    print(found)
    if found.score is not None:
        print(f"read by {reader}")
