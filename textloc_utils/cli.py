"""``textloc``: a thin face on the package. Mistakes end in one line on stderr and exit status 2, an edit that is none
in one line and exit status 3."""

import argparse
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

from textloc_utils import prompts
from textloc_utils.settings import PRESETS, TextlocError, check_writable, data_dir, preset

#: Options of ``textloc train`` that set the budget's fields of the same name.
BUDGET = {
    "samples": (int, "stop after this many training pictures"),
    "seconds": (float, "stop after this many seconds of denoiser training"),
    "autoencoder_seconds": (float, "time for the autoencoder, before"),
    "pool": (int, "scenes encoded once, before"),
    "batch": (int, "pictures per step, over all processes"),
    "lr": (float, "learning rate"),
    "evaluations": (int, "how often spelling and patch effects are measured"),
}

#: Options of ``textloc lora train`` that set the fields of the same name of ``lora.Training``.
LORA = {
    "rank": (int, "rank of the adapters"),
    "steps": (int, "training steps"),
    "batch": (int, "pictures per step, over all processes"),
    "lr": (float, "learning rate"),
}


#: Exit status of ``textloc edit`` where the picture does not say the new text, or was lost.
EDIT_FAILED = 3


def _models(args) -> None:
    from textloc_utils import models

    rows = [models.describe(s) for s in models.registry().values()]
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{'name':<12} {'family':<22} {'pipeline':<28} {'parameters':>14} {'text layers':>11}")
    for row in rows:
        print(
            f"{row['name']:<12} {row['family']:<22} {row['pipeline']:<28} "
            f"{row['parameters']:>14,} {len(row['text_layers']):>11}"
        )


def _generate(args) -> None:
    from textloc_utils import generate, models, ocr

    folder = check_writable(args.out)
    ocr.tesseract_version()  # before minutes of sampling, not after
    for prompt in args.prompt:
        prompts.quoted_text(prompt)
    model = models.load(args.model, device=args.device, model_path=args.model_path)
    seeds = [args.seed] * len(args.prompt)
    bar = sys.stderr.isatty()
    made = generate.generate(model, args.prompt, seeds, steps=args.steps, guidance=args.guidance, progress=bar)
    rows = generate.save(folder, made, args.prompt, seeds, ocr.read(made.images))
    if args.json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
    else:
        for row in rows:
            print(f"{folder / row['file']}  {row['ocr'] or '(no text found)'}  <- {row['prompt']}")


def _localize(args) -> None:
    from textloc_utils import localize, models, ocr, onestep

    work = preset(args.preset)
    # A published table is the book's, which sweeps over more pairs than it probes without pictures.
    drawn = args.publish and args.search not in onestep.DEPTHS
    pairs = args.pairs if args.pairs is not None else work.sweep_pairs if drawn else work.pairs
    if args.prompts in prompts.SETS:
        chosen = prompts.make_pairs(pairs, args.seed, template=prompts.SETS[args.prompts])
    else:
        chosen = prompts.load_pairs(args.prompts, pairs, args.seed)
    ocr.tesseract_version()
    model = models.load(args.model, device=_process_device(args.device), model_path=args.model_path)
    found = localize.search(
        model,
        chosen,
        how=args.search,
        share=args.reach,
        budget=args.budget,
        steps=work.steps,
        progress=sys.stderr.isatty() and _rank() == 0,
    )
    if _rank():
        return
    if args.publish:
        localize.publish(model, chosen, found, share=args.reach, budget=args.budget, steps=work.steps)
    if args.json:
        print(json.dumps(asdict(found), indent=1))
        return
    for layer, effect in enumerate(found.effects):
        mark = "*" if layer in found.layers else " "
        print(f"{mark} {layer:>3}  {effect:6.2f}  {'#' * round(40 * max(0.0, effect))}")
    print(f"layers {' '.join(map(str, found.layers))}: {found.share:.2%} of the denoiser's parameters")
    if found.score is not None:
        print(f"target text score {found.score}")
    print(f"share of the effect of all layers {found.reached}; confidence {found.confidence:.2f}")
    print(f"{found.row_evaluations:,} denoiser row evaluations, {found.seconds:.0f} s")


def _study(args) -> None:
    from textloc_utils import localize, models, ocr, studies

    work, bar = preset(args.preset), sys.stderr.isatty()
    ocr.tesseract_version()
    if args.runs:
        table = studies.publish_seeds(args.model, [Path(run) for run in args.runs], work.pairs, args.seed, progress=bar)
        for seed, part in table.groupby("training_seed", sort=False):
            print(f"training seed {seed}: layers {' '.join(map(str, part.layer[part.chosen]))}")
            _print_effects(part.assign(site="layer " + part.layer.astype(str)))
        return
    model = models.load(args.model, device=args.device, model_path=args.model_path)
    layers = args.layers or localize.known_layers(model)
    options = {"steps": work.steps, "progress": bar, "publish": args.publish}
    for name in args.study or studies.STUDIES:
        print(f"{name}, layers {' '.join(map(str, layers))}")
        _print_effects(localize.effect_intervals(studies.study(model, name, layers, work.pairs, args.seed, **options)))


def _run(args) -> None:
    from textloc_utils import notebooks

    parameters = {}
    if args.models:
        from textloc_utils import models

        parameters["MODELS"] = " ".join(models.spec(name).name for name in args.models)
    if args.preset:
        parameters["PRESET"] = args.preset
    if args.seed is not None:
        parameters["SEED"] = args.seed
    planned = notebooks.plan(args.notebooks, parameters, args.out and check_writable(args.out))
    executed = notebooks.execute(planned, jobs=args.jobs, timeout=args.timeout, progress=sys.stderr.isatty())
    current = len(planned) - len(executed)
    print(f"{len(executed)} notebooks executed, {current} up to date" if executed else f"all {current} are up to date")


def _strip(args) -> None:
    from textloc_utils import notebooks

    for path in args.notebooks:
        notebooks.strip(path)


def _explore(args) -> None:
    from textloc_utils import explorer, models, ocr

    pairs = prompts.make_pairs(args.pairs, args.seed)
    ocr.tesseract_version()
    for model in [models.load(name, device=args.device) for name in args.models]:
        table = explorer.publish(model, pairs, progress=sys.stderr.isatty())
        print(f"{model.spec.name}: {len(table)} pictures of {len(pairs)} pairs in {explorer.store().root}")


def _lora_train(args) -> None:
    from textloc_utils import lora, lora_study, models

    folder, spec = check_writable(args.out), models.spec(args.model)
    given = {name: getattr(args, name) for name in LORA if getattr(args, name) is not None}
    training = lora.Training(layers=(), self_attention=args.self_attention, seed=args.seed, **given)
    _numbered(args.layers)
    if args.data is not None:
        pictures = lora.load_folder(args.data, spec.height, spec.width)
    elif spec.miniature:
        pictures = lora_study.drawn_scenes(lora_study.SCENES)
    else:
        raise TextlocError(f"{args.model} needs --data DIR: the default task is drawn at the miniatures' size")
    model = models.load(args.model, device=_process_device(args.device), model_path=args.model_path)
    training = replace(training, layers=_named_layers(model, args.layers, args.seed))
    lora.targets(model, training)
    bar = sys.stderr.isatty() and _rank() == 0
    report = lora.train(model, lora.prepare(model, *pictures), training, folder=folder, progress=bar)
    if _rank() == 0:
        print(f"{folder / lora.FILE}: layers {' '.join(map(str, training.layers))}, {report.parameters:,} parameters")
        print(f"{report.seconds_per_step:.3f} s per step, {report.saved_bytes / 2**20:.1f} MiB kept for the gradient")


def _named_layers(model, asked: list[str], seed: int) -> tuple[int, ...]:
    """Text layers by number, ``all``, ``localized`` or ``random`` (as many as are localized, drawn from the others)."""
    from textloc_utils import localize, lora_study

    if asked == ["all"]:
        return tuple(range(len(model.layers)))
    numbers = _numbered(asked)
    if numbers is not None:
        return numbers
    layers = localize.known_layers(model)
    return layers if asked == ["localized"] else lora_study.random_layers(model, layers, seed)


def _numbered(asked: list[str]) -> tuple[int, ...] | None:
    """Layers that are given by number, None where they are named; TextlocError for what is neither."""
    if asked in (["localized"], ["all"], ["random"]):
        return None
    try:
        return tuple(sorted({int(layer) for layer in asked}))
    except ValueError:
        raise TextlocError(f"--layers takes localized, all, random, or numbers; got {' '.join(asked)}") from None


def _lora_eval(args) -> None:
    from textloc_utils import lora, lora_study, models

    lora.check_adapter(args.adapter)
    model = models.load(args.model, device=args.device, model_path=args.model_path)
    table = lora_study.evaluate(model, args.adapter, args.words, args.seed)
    if args.json:
        print(json.dumps(table.to_dict("records"), indent=1))
        return
    _print_scores(table)


def _lora_study(args) -> None:
    from textloc_utils import lora_study, models, ocr

    work = preset(args.preset)
    ocr.tesseract_version()
    model = models.load(args.model, device=args.device, model_path=args.model_path)
    layers = _named_layers(model, args.layers, args.seed)
    bar = sys.stderr.isatty()
    table = lora_study.study(
        model, layers, work.sweep_pairs, args.seed, steps=work.steps, progress=bar, publish=args.publish
    )
    _print_scores(table)


def _print_scores(table) -> None:
    columns = ["arm", "equal", "seed", "layers", "rank", "parameters", "seconds_per_step"]
    scores = ["new_score", "new_exact", "old_score", "old_exact", "diversity"]
    shown = table[[c for c in columns + scores if c in table]]
    print(shown.to_string(index=False, float_format=lambda value: f"{value:.3f}"))


def _edit(args) -> int:
    from textloc_utils import edit, localize, models, ocr

    work, bar = preset("book"), sys.stderr.isatty()
    if args.pairs is not None and args.pairs < 1:
        raise TextlocError(f"--pairs must be at least 1, got {args.pairs}")
    if not args.table:
        if lacking := [f"--{name}" for name in ("prompt", "to", "out") if getattr(args, name) is None]:
            raise TextlocError(f"textloc edit needs {', '.join(lacking)} (or --table)")
        spec = models.spec(args.model)
        pair = replace(edit.check_text(spec, args.prompt, args.to), seed=args.seed)
        picture = edit.open_picture(args.image, spec) if args.image else None
        folder = check_writable(args.out)
    ocr.tesseract_version()
    model = models.load(args.model, device=args.device, model_path=args.model_path)
    layers = args.layers or localize.known_layers(model)
    for name in args.table or ():
        pairs = edit.held_out_pairs(args.pairs or (work.pairs if name == "curve" else work.sweep_pairs), args.seed)
        table = edit.table(model, name, layers, pairs, progress=bar, publish=args.publish)
        print(f"{name}, layers {' '.join(map(str, layers))}")
        columns = ["method", "start", "share", "n", "f1", "cer", "exact", "ssim", "ssim_outside", "psnr_outside"]
        print(edit.summarise(table)[columns].round(3).to_string(index=False))
    if args.table:
        return 0
    before, after, report = edit.report(model, pair, edit.localized(layers, args.start), picture)
    edit.save(folder, before, after, report)
    if args.json:
        print(json.dumps(report, indent=1, ensure_ascii=False))
    else:
        read = [report[name] or "(no text found)" for name in ("before", "after")]
        print(f"{folder / 'edit.png'}  {read[0]} -> {read[1]}  SSIM outside the text {report['ssim_outside']:.2f}")
    if report["failure"]:
        print(f"textloc: {report['failure']}", file=sys.stderr)
        return EDIT_FAILED
    return 0


def _guard(args) -> None:
    from textloc_utils import models, ocr, safety
    from textloc_utils.safety import detector as words

    folder = check_writable(args.out)
    ocr.tesseract_version()
    asked = args.prompt or prompts.read_prompts(args.file)
    detector = words.WordDetector(words.read_words(args.words) if args.words else None)
    model = models.load(args.model, device=args.device, model_path=args.model_path)
    guarded = safety.guard(model, args.layers, detector=detector)
    rows = safety.draw(guarded, asked, folder, seed=args.seed, steps=args.steps, progress=sys.stderr.isatty())
    if args.json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    for row in rows:
        found = f"found {', '.join(row['found'])}; " if row["found"] else ""
        print(f"{folder / row['file']}  {found}reads {row['ocr'] or 'nothing'}  <- {row['prompt']}")


def _safety(args) -> None:
    from textloc_utils import models, ocr, safety

    work = preset(args.preset)
    ocr.tesseract_version()
    model = models.load(args.model, device=args.device, model_path=args.model_path)
    options = {"layers": args.layers, "steps": work.steps, "progress": sys.stderr.isatty(), "publish": args.publish}
    table = safety.measure(model, work.sweep_pairs, args.seed, **options)
    for row in safety.summarise(table).itertuples():
        print(
            f"{row.method:<16} toxic text {row.exact:.3f} [{row.exact_low:.3f}, {row.exact_high:.3f}]  "
            f"SSIM outside {row.ssim_outside:.3f}  extra rows {row.extra:.0%}  {row.seconds:.2f} s"
        )
    guarded = table[(table.kind == "harmless") & (table.method == "guard")]
    print(f"harmless pictures unchanged bit for bit: {guarded.unchanged.sum()} of {len(guarded)}")


def _print_effects(table) -> None:
    for row in table.itertuples():
        print(f"  {row.site:<24} {row.mean:6.2f} [{row.low:.2f}, {row.high:.2f}]")


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _process_device(device: str) -> str:
    """Each process of a launch takes the accelerator of its own rank."""
    import torch

    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if local and device in ("auto", "cuda") and torch.cuda.is_available() else device


def _train(args) -> None:
    from textloc_utils.miniatures import card, training

    given = {k: getattr(args, k) for k in BUDGET if getattr(args, k) is not None}
    if wrong := [k for k, v in given.items() if v < 0 or (v == 0 and k != "evaluations")]:
        raise TextlocError(f"--{wrong[0].replace('_', '-')} must be positive, got {given[wrong[0]]}")
    budget = replace(training.default_budget(args.name), **given)
    folder = check_writable(args.out or data_dir() / "runs" / args.name)
    destination = card.check_destination(args.ship or data_dir() / "miniatures" / args.name)
    report = training.train(
        args.name,
        folder,
        budget=budget,
        seed=args.seed,
        device=args.device,
        precision=args.precision,
        compiled=args.compile,
        start=args.start and Path(args.start),
    )
    if report is not None:  # the main process
        shipped = card.export(args.name, folder, destination)
        print(json.dumps(shipped["trained"]))


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = argparse.ArgumentParser(prog="textloc", description="Where diffusion models keep the text they draw.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    models = commands.add_parser("models", help="list the models, their text layers and parameter shares")
    models.add_argument("--json", action="store_true", help="print a list of objects")
    models.set_defaults(run=_models)

    generate = commands.add_parser("generate", help="draw pictures from prompts and read them by OCR")
    _model(generate)
    generate.add_argument("prompt", metavar="PROMPT", nargs="+", help="a prompt, the text in double quotes")
    generate.add_argument(
        "--seed", type=int, default=42, help="seed of the noise, the same for every prompt (default: 42)"
    )
    generate.add_argument("--out", required=True, metavar="DIR", help="folder for the PNG files and images.json")
    generate.add_argument("--steps", type=int, help="denoising steps (default: the model's own)")
    generate.add_argument("--guidance", type=float, help="guidance scale (default: the model's own)")
    generate.add_argument("--json", action="store_true", help="print what images.json holds")
    generate.set_defaults(run=_generate)

    localize = commands.add_parser(
        "localize",
        help="find the layers that hold the text",
        description="Find the layers that hold the text. Results are kept pair by pair: a killed run goes on where it "
        "was. Several processes or GPUs share the pairs out: accelerate launch -m textloc_utils.cli localize MODEL",
    )
    _model(localize)
    localize.add_argument(
        "--search",
        default="budgeted",
        choices=["exhaustive", "budgeted", "one-step", "attribution"],
        help="exhaustive draws every layer for every pair; budgeted finds the set for a fraction of that; one-step and "
        "attribution draw no picture (default: budgeted)",
    )
    localize.add_argument("--preset", default="book", choices=PRESETS, help="how many pairs and steps (default: book)")
    localize.add_argument("--pairs", type=int, metavar="N", help="number of pairs (default: the preset's)")
    localize.add_argument(
        "--prompts",
        default="book",
        metavar="SET",
        help=f"{', '.join(prompts.SETS)}, or a text file with one prompt in each line (default: book)",
    )
    localize.add_argument("--seed", type=int, default=42, help="draws words, colours and noise (default: 42)")
    localize.add_argument(
        "--reach",
        type=float,
        default=0.9,
        help="of the all-layer patch's effect that the set must reach (default: 0.9)",
    )
    localize.add_argument(
        "--budget",
        type=float,
        default=0.1,
        help="of the exhaustive sweep's cost, for --search budgeted; one round is always done (default: 0.1)",
    )
    localize.add_argument("--json", action="store_true", help="print an object")
    localize.add_argument(
        "--publish",
        action="store_true",
        help="write the outcome to the data folder, where the book's notebooks find it",
    )
    localize.set_defaults(run=_localize)

    study = commands.add_parser(
        "study",
        help="what the localized layers carry: text against colours, steps, heads, keys, values, length",
    )
    _model(study)
    study.add_argument("--study", nargs="+", choices=["colours", "steps", "parts", "length"], help="default: all")
    study.add_argument(
        "--layers", type=int, nargs="+", metavar="L", help="the localized layers (default: the published search's)"
    )
    study.add_argument(
        "--runs",
        nargs="+",
        metavar="DIR",
        help="instead: what `textloc train MODEL --seed N --ship DIR` wrote; are the layers the same? Published",
    )
    study.add_argument("--preset", default="book", choices=PRESETS, help="how many pairs and steps (default: book)")
    study.add_argument("--seed", type=int, default=42, help="draws words, colours and noise (default: 42)")
    study.add_argument("--publish", action="store_true", help="write the tables to the data folder, for the book")
    study.set_defaults(run=_study)

    run = commands.add_parser(
        "run",
        help="execute the book's notebooks, those that are out of date",
        description="Execute notebooks with papermill, in place, or with other parameters into a folder. A notebook is "
        "replaced only after it ran through, and left alone where nothing changed; a killed run goes on where it was.",
    )
    run.add_argument("notebooks", metavar="NOTEBOOK", nargs="*", help="notebook files (default: all of the book)")
    run.add_argument(
        "--models", nargs="+", metavar="MODEL", help="names from `textloc models` (default: the notebook's)"
    )
    run.add_argument("--preset", choices=PRESETS, help="how much to run (default: the notebook's)")
    run.add_argument("--seed", type=int, help="draws words, colours and noise (default: the notebook's)")
    run.add_argument("--out", metavar="DIR", help="folder for the executed notebooks; needed with other parameters")
    run.add_argument("--jobs", type=int, metavar="N", help="notebooks at a time (default: one per core, at most 4)")
    run.add_argument("--timeout", type=int, default=1800, metavar="SECONDS", help="for one cell (default: 1800)")
    run.set_defaults(run=_run)

    strip = commands.add_parser(
        "strip",
        help="take out of executed notebooks what differs from run to run",
        description="What `textloc run` does after papermill: times and papermill's notes go, and what a cell printed "
        "becomes one output. Two runs of a notebook then give the same bytes.",
    )
    strip.add_argument("notebooks", metavar="NOTEBOOK", nargs="+", help="notebook files, changed in place")
    strip.set_defaults(run=_strip)

    explore = commands.add_parser("explore", help="draw the pictures of the book's layer explorer into the data folder")
    explore.add_argument("models", metavar="MODEL", nargs="+", help="names from `textloc models`")
    explore.add_argument("--pairs", type=int, default=6, metavar="N", help="number of pairs (default: 6)")
    explore.add_argument("--seed", type=int, default=42, help="draws words, colours and noise (default: 42)")
    _place(explore)
    explore.set_defaults(run=_explore)

    _lora(commands.add_parser("lora", help="adapters on chosen text layers: train, measure, compare"))

    edit = commands.add_parser(
        "edit",
        help="replace the text in a picture and keep the picture",
        description="Replace the text in a picture, drawn from a prompt or given as a file. Writes before.png, "
        "after.png, edit.png (both and their difference side by side) and edit.json. Exit status 3: the picture does "
        "not say the new text, or was lost.",
    )
    _model(edit)
    edit.add_argument("--prompt", help="describes the picture, its text in double quotes")
    edit.add_argument("--to", metavar="NEW", help="the new text")
    edit.add_argument("--image", metavar="FILE", help="a picture of the model's size (default: drawn from the prompt)")
    edit.add_argument("--seed", type=int, default=42, help="seed of the noise (default: 42)")
    edit.add_argument("--layers", type=int, nargs="+", metavar="L", help="default: the published search's")
    edit.add_argument(
        "--start", type=int, default=0, help="the step from which the layers read the new text (default: 0)"
    )
    edit.add_argument("--out", metavar="DIR", help="folder for the pictures and the report")
    edit.add_argument("--json", action="store_true", help="print the report")
    edit.add_argument(
        "--table",
        nargs="+",
        choices=["methods", "curve", "given"],
        help="instead: compare editing with its baselines over many pairs, on given pictures, along trade-off curves",
    )
    edit.add_argument("--pairs", type=int, metavar="N", help="of a table (default: 100, for curves 48)")
    edit.add_argument("--publish", action="store_true", help="write the tables to the data folder, for the book")
    edit.set_defaults(run=_edit)

    guard = commands.add_parser(
        "guard",
        help="draw prompts and keep toxic text out of the pictures",
        description="Draw prompts; where one asks for toxic text, the localized layers read it with a harmless word in "
        "its place. Started again, it goes on where it was.",
    )
    _model(guard)
    asked = guard.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", nargs="+", metavar="PROMPT", help="prompts, their texts in quotes")
    asked.add_argument("--file", metavar="FILE", help="a text file with one prompt in each line")
    guard.add_argument("--out", required=True, metavar="DIR", help="folder for the PNG files and images.json")
    _layers(guard)
    guard.add_argument("--words", metavar="FILE", help="your own list, one word in each line (default: mild insults)")
    guard.add_argument(
        "--seed", type=int, default=42, help="seed of the noise, the same for every prompt (default: 42)"
    )
    guard.add_argument("--steps", type=int, help="denoising steps (default: the model's own)")
    guard.add_argument("--json", action="store_true", help="print what images.json holds")
    guard.set_defaults(run=_guard)

    safety = commands.add_parser(
        "safety",
        help="measure the guard against negative prompt, Safe Latent Diffusion and prompt swap",
        description="Measure the guard on toxic and harmless prompts. Results are kept prompt by prompt: a killed run "
        "goes on where it was.",
    )
    _model(safety)
    _layers(safety)
    safety.add_argument("--preset", default="book", choices=PRESETS, help="how many prompts and steps (default: book)")
    safety.add_argument("--seed", type=int, default=42, help="draws words, colours and noise (default: 42)")
    safety.add_argument("--publish", action="store_true", help="write the table to the data folder, for the book")
    safety.set_defaults(run=_safety)

    train = commands.add_parser(
        "train",
        help="train a miniature from scratch; started again, it resumes",
        description="Train a miniature from scratch. A killed run goes on where its last checkpoint was. Two processes "
        "with one thread each: OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 -m textloc_utils.cli train NAME",
    )
    train.add_argument("name", metavar="NAME", help="a miniature, like sd3-mini")
    train.add_argument("--out", metavar="DIR", help="folder of the run (default: data/runs/NAME)")
    for name, (kind, text) in BUDGET.items():
        train.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=text)
    train.add_argument("--seed", type=int, default=0)
    train.add_argument(
        "--start", metavar="DIR", help="begin with the weights of this trained miniature instead of untrained ones"
    )
    train.add_argument("--ship", metavar="DIR", help="folder of the finished miniature (default: data/miniatures/NAME)")
    train.add_argument(
        "--precision",
        default="auto",
        choices=["auto", "fp32", "bf16"],
        help="auto: bf16 where the device computes in it",
    )
    train.add_argument(
        "--compile", action="store_true", help="compile the denoiser first: minutes to begin with, then faster steps"
    )
    _place(train)
    train.set_defaults(run=_train)
    return top


def _lora(command: argparse.ArgumentParser) -> None:
    commands = command.add_subparsers(dest="action", required=True, metavar="ACTION")
    chosen = {
        "nargs": "+",
        "metavar": "L",
        "default": ["localized"],
        "help": "localized (by the published search; default), all, random (as many others), or numbers",
    }

    train = commands.add_parser(
        "train",
        help="train an adapter; started again, it resumes",
        description="Train an adapter (LoRA) and save it as a diffusers file. A killed run goes on where its last "
        "checkpoint was. Several processes share the batch: accelerate launch -m textloc_utils.cli lora train MODEL",
    )
    _model(train)
    train.add_argument("--layers", **chosen)
    train.add_argument("--self-attention", action="store_true", help="and all attention of the picture to itself")
    train.add_argument(
        "--data",
        metavar="DIR",
        help="pictures, and their captions in metadata.csv with columns file_name and text (default: drawn banners "
        "with seven letters, which no miniature has seen)",
    )
    for name, (kind, text) in LORA.items():
        train.add_argument(f"--{name}", type=kind, metavar="N", help=text)
    train.add_argument("--seed", type=int, default=0, help="of the adapter's start, batches and noise (default: 0)")
    train.add_argument("--out", required=True, metavar="DIR", help="folder of the adapter")
    train.set_defaults(run=_lora_train)

    evaluate = commands.add_parser("eval", help="spelling of seven and of three to six letters, before and after")
    _model(evaluate)
    evaluate.add_argument("--adapter", required=True, metavar="DIR", help="the --out of `textloc lora train`")
    evaluate.add_argument("--words", type=int, default=100, metavar="N", help="of each task (default: 100)")
    evaluate.add_argument("--seed", type=int, default=42, help="draws words, colours and noise (default: 42)")
    evaluate.add_argument("--json", action="store_true", help="print a list of two objects")
    evaluate.set_defaults(run=_lora_eval)

    study = commands.add_parser("study", help="localized layers against all, random ones, and all attention")
    _model(study)
    study.add_argument("--layers", **chosen)
    study.add_argument("--preset", default="book", choices=PRESETS, help="how many words and steps (default: book)")
    study.add_argument("--seed", type=int, default=42, help="draws words, colours and noise (default: 42)")
    study.add_argument("--publish", action="store_true", help="write the table to the data folder, for the book")
    study.set_defaults(run=_lora_study)


def _model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="a name from `textloc models`")
    command.add_argument("--model-path", metavar="DIR", help="a local folder or another repository of the same family")
    _place(command)


def _layers(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--layers", type=int, nargs="+", metavar="L", help="the localized layers (default: the published search's)"
    )


def _place(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", help="auto, cpu, cuda (default: auto)")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except TextlocError as error:
        print(f"textloc: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 1


if __name__ == "__main__":
    sys.exit(main())
