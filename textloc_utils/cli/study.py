"""The book's measurements: ``study contents``, ``seeds``, ``edit``, ``guard``, ``lora``.

All are kept piece by piece: a killed run goes on where it was.
"""

from pathlib import Path

from textloc_utils.cli import adapters, options
from textloc_utils.settings import preset


def add(commands) -> None:
    """Add this group's commands."""
    studies = commands.add_parser("study", help="the book's measurements; results are kept piece by piece")
    studies = studies.add_subparsers(dest="study", required=True, metavar="STUDY")
    for each in (_add_contents, _add_seeds, _add_edit, _add_guard, _add_lora):
        each(studies)


def _add_contents(studies) -> None:
    contents = studies.add_parser(
        "contents", help="what the localized layers carry: text against colours, steps, heads, keys, values, length"
    )
    options.add_model(contents)
    contents.add_argument(
        "--tables", nargs="+", choices=["colours", "steps", "parts", "length"], help="which tables (default: all)"
    )
    options.add_layers(contents)
    options.add_preset(contents, "how many pairs and steps")
    options.add_seed(contents)
    options.add_publish(contents, "the tables")
    contents.set_defaults(run=_contents)


def _contents(args) -> None:
    from textloc_utils import layer_contents, sweeps

    run, work, layers = _experiment(args)
    for name in args.tables or layer_contents.STUDIES:
        print(f"{name}, layers {' '.join(map(str, layers))}")
        table = layer_contents.study(run, name, layers, work.pairs, args.seed)
        _print_effects(sweeps.effect_intervals(table))
    _print_reader(args)


def _add_seeds(studies) -> None:
    seeds = studies.add_parser(
        "seeds",
        help="whether other trainings of a miniature keep the text in the same layers",
        description="Search the layers of a miniature that was trained again from other seeds, and of the book's. The "
        "tables are published.",
    )
    seeds.add_argument("model", metavar="MODEL", help="a miniature, like sd3-mini")
    seeds.add_argument(
        "runs",
        nargs="+",
        type=options.path,
        metavar="DIR",
        help="what `textloc train MODEL --seed N --ship DIR` wrote",
    )
    options.add_preset(seeds, "how many pairs")
    options.add_seed(seeds)
    seeds.set_defaults(run=_seeds)


def _seeds(args) -> None:
    from textloc_utils import models, ocr, training_seeds

    args.reader = ocr.check_reader(models.spec(args.model).height)
    runs, n = [Path(run) for run in args.runs], preset(args.preset).pairs
    table = training_seeds.publish(args.model, runs, n, args.seed, progress=options.progress())
    for seed, part in table.groupby("training_seed", sort=False):
        print(f"training seed {seed}: layers {' '.join(map(str, part.layer[part.chosen]))}")
        _print_effects(part.assign(site="layer " + part.layer.astype(str)))
    _print_reader(args)


def _add_edit(studies) -> None:
    edit = studies.add_parser(
        "edit", help="editing against its baselines: over many pairs, along trade-off curves, on given pictures"
    )
    options.add_model(edit)
    edit.add_argument(
        "--tables", nargs="+", default=["methods"], choices=["methods", "curve", "given"], help="default: methods"
    )
    edit.add_argument("--pairs", type=options.count, metavar="N", help="of a table (default: the preset's)")
    options.add_noises(edit, None)
    options.add_layers(edit)
    options.add_preset(edit, "how many pairs, noises and steps")
    options.add_seed(edit)
    options.add_publish(edit, "the tables")
    edit.set_defaults(run=_edit)


def _edit(args) -> None:
    from textloc_utils import edit, prompts

    run, work, layers = _experiment(args)
    for name in args.tables:
        pairs = edit.held_out_pairs(args.pairs or (work.pairs if name == "curve" else work.edits), args.seed)
        pairs = prompts.with_noises(pairs, args.noises or work.noises)
        table = edit.table(run, name, layers, pairs)
        print(f"{name}, layers {' '.join(map(str, layers))}")
        columns = ["method", "start", "share", "n", "f1", "cer", "exact", "ssim", "ssim_outside", "psnr_outside"]
        print(edit.summarise(table)[columns].round(3).to_string(index=False))
    _print_reader(args)


def _add_guard(studies) -> None:
    guard = studies.add_parser("guard", help="the guard against negative prompt, Safe Latent Diffusion and prompt swap")
    options.add_model(guard)
    options.add_layers(guard)
    options.add_noises(guard, None)
    options.add_preset(guard, "how many prompts, noises and steps")
    options.add_seed(guard)
    options.add_publish(guard)
    guard.set_defaults(run=_guard)


def _guard(args) -> None:
    from textloc_utils import metrics, safety

    run, work, layers = _experiment(args)
    table = safety.measure(run, work.toxic, args.seed, layers=layers, noises=args.noises or work.noises)
    for row in safety.summarise(table).itertuples():
        print(
            f"{row.method:<16} toxic text {metrics.span(row.exact, row.exact_low, row.exact_high)}  "
            f"SSIM outside {row.ssim_outside:.3f}  extra rows {row.extra:.0%}  {row.seconds:.2f} s"
        )
    guarded = table[(table.kind == "harmless") & (table.method == "guard")]
    print(f"harmless pictures unchanged bit for bit: {guarded.unchanged.sum()} of {len(guarded)}")
    _print_reader(args)


def _add_lora(studies) -> None:
    lora = studies.add_parser("lora", help="adapters on localized layers against all, random ones, and all attention")
    options.add_model(lora)
    adapters.add_chosen_layers(lora)
    options.add_preset(lora, "how many words and steps")
    options.add_seed(lora)
    options.add_publish(lora)
    lora.set_defaults(run=_lora)


def _lora(args) -> None:
    from textloc_utils import lora_study

    adapters.check_layers(args.layers)
    work, model = preset(args.preset), _model(args)
    layers = adapters.layers_of(model, args.layers, args.seed)
    run, training = options.experiment(args, model, steps=work.steps), lora_study.shared(work.steps)
    adapters.print_scores(lora_study.study(run, layers, work.sweep_pairs, args.seed, training=training))
    _print_reader(args)


def _model(args):
    """The model, after its reader was asked for; :func:`_print_reader` names that in the end."""
    from textloc_utils import ocr

    spec = options.spec_of(args)
    args.reader = ocr.check_reader(spec.height)
    return options.loaded(args, spec)


def _experiment(args):
    """The experiment, its preset, and the localized layers."""
    from textloc_utils.experiment import known_layers

    work, model = preset(args.preset), _model(args)
    return options.experiment(args, model, steps=work.steps), work, args.layers or known_layers(model)


def _print_reader(args) -> None:
    print(f"read by {args.reader}")


def _print_effects(table) -> None:
    for row in table.itertuples():
        print(f"  {row.site:<24} {row.mean:6.2f} [{row.low:.2f}, {row.high:.2f}]")
