"""Commands that list models and draw pictures: ``models``, ``generate``, ``guard``."""

import json

from textloc_utils.cli import options


def add(commands) -> None:
    """Add this group's commands."""
    _add_models(commands)
    _add_generate(commands)
    _add_guard(commands)


def _add_models(commands) -> None:
    models = commands.add_parser("models", help="list the models, their text layers and shares of the parameters")
    options.add_json(models, "a list of objects")
    models.set_defaults(run=_models)


def _models(args) -> None:
    from textloc_utils import models

    rows = [models.describe(s) for s in models.registry().values()]
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{'name':<17} {'family':<27} {'pipeline':<25} {'parameters':>14} {'text layers':>11}")
    for row in rows:
        numbers = ("unknown", "") if row["parameters"] is None else (f"{row['parameters']:,}", len(row["text_layers"]))
        print(f"{row['name']:<17} {row['family']:<27} {row['pipeline']:<25} {numbers[0]:>14} {numbers[1]:>11}")
    for row in rows:
        if row["unverified"]:
            print(f"not verified of {row['name']}: {row['unverified']}")


def _add_generate(commands) -> None:
    generate = commands.add_parser("generate", help="draw pictures from prompts and read them with OCR")
    options.add_model(generate)
    generate.add_argument("prompt", metavar="PROMPT", nargs="+", help="a prompt with its text in double quotes")
    generate.add_argument("--out", required=True, type=options.folder, metavar="DIR", help="folder for the PNG files")
    options.add_seed(generate, "seed of the first noise, the same for every prompt; further noises take the next seeds")
    options.add_noises(generate)
    options.add_drawing(generate)
    options.add_json(generate, "the content of images.json")
    generate.set_defaults(run=_generate)


def _generate(args) -> None:
    from textloc_utils import generate, ocr, prompts

    texts = [prompts.quoted_text(prompt) for prompt in args.prompt]
    spec = options.spec_of(args)
    reader = ocr.check_reader(spec.height, texts)  # before the sampling, which may take minutes
    model = options.loaded(args, spec)
    asked = [prompt for prompt in args.prompt for _ in range(args.noises)]
    seeds = [args.seed + i for _ in args.prompt for i in range(args.noises)]
    drawing = {"guidance": args.guidance, "negative_prompt": args.negative_prompt, "steps": args.steps}
    made = generate.generate(model, asked, seeds, progress=options.progress(), **drawing)
    found = ocr.readings(made.images)
    more = [{"text_found": reading.found, "reader": reading.reader} for reading in found]
    rows = generate.save(args.out, made.images, asked, seeds, [reading.text for reading in found], more=more)
    if args.json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    for row, reading in zip(rows, found, strict=True):
        print(f"{args.out / row['file']}  {reading}  <- {row['prompt']}")
    print(f"read by {reader}")


def _add_guard(commands) -> None:
    guard = commands.add_parser(
        "guard",
        help="draw prompts and keep toxic text out of the pictures",
        description="Draw prompts. If a prompt asks for toxic text, the localized layers read a harmless word instead. "
        "A run that is started again resumes where it stopped.",
    )
    options.add_model(guard)
    asked = guard.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", nargs="+", metavar="PROMPT", help="prompts with their texts in quotes")
    asked.add_argument("--file", type=options.path, metavar="FILE", help="a text file with one prompt per line")
    guard.add_argument("--out", required=True, type=options.folder, metavar="DIR", help="folder for the PNG files")
    options.add_layers(guard)
    guard.add_argument(
        "--words",
        type=options.path,
        metavar="FILE",
        help="your own list, a text file with one word per line (default: mild insults)",
    )
    options.add_seed(guard, "seed of the noise, the same for every prompt")
    guard.add_argument("--steps", type=options.steps, help="denoising steps (default: the model's own)")
    options.add_json(guard, "the content of images.json")
    guard.set_defaults(run=_guard)


def _guard(args) -> None:
    from textloc_utils import ocr, prompts, safety
    from textloc_utils.safety import detector as words

    asked = args.prompt or prompts.read_prompts(args.file)
    detector = words.WordDetector(words.read_words(args.words) if args.words else None)
    spec = options.spec_of(args)
    reader = ocr.check_reader(spec.height)
    guarded = safety.guard(options.loaded(args, spec), args.layers, detector=detector)
    rows = safety.draw(guarded, asked, args.out, seed=args.seed, steps=args.steps, progress=options.progress())
    if args.json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    for row in rows:
        found = f"found {', '.join(row['found'])}; " if row["found"] else ""
        print(f"{args.out / row['file']}  {found}reads {row['ocr'] or 'nothing'}  <- {row['prompt']}")
    print(f"read by {reader}")
