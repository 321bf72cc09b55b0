"""Replace the text in a picture: ``edit``."""

import json
import sys
from dataclasses import replace

from textloc_utils.cli import options
from textloc_utils.settings import TextlocError

#: Exit status if an edited picture does not show the new text, or if too little of the picture was kept.
FAILED = 3


def add(commands) -> None:
    """Add this group's command."""
    edit = commands.add_parser(
        "edit",
        help="replace the text in a picture and keep the picture",
        description="Replace the text in a picture that is drawn from a prompt or given as a file. Writes before.png, "
        "after.png, edit.png (both pictures and their difference side by side) and edit.json. With several noises, "
        "each seed has its own folder. The exit status is 3 if a picture does not show the new text, or if too little "
        "of the picture was kept.",
    )
    options.add_model(edit)
    edit.add_argument("--prompt", required=True, help="a description of the picture, with its text in double quotes")
    edit.add_argument("--to", required=True, metavar="NEW", help="the new text")
    edit.add_argument(
        "--out", required=True, type=options.folder, metavar="DIR", help="folder for the pictures and the report"
    )
    edit.add_argument(
        "--image", type=options.path, metavar="FILE", help="a picture of the model's size (default: draw one)"
    )
    options.add_seed(edit, "seed of the first noise; further noises take the next seeds")
    options.add_noises(edit)
    options.add_drawing(edit)
    options.add_layers(edit)
    edit.add_argument(
        "--start",
        type=options.whole(0, options.MOST_STEPS),
        default=0,
        help="the step from which the layers read the new text (default: 0)",
    )
    options.add_json(edit, "the report, or a list of reports with several noises")
    edit.set_defaults(run=_edit)


def _edit(args) -> int:
    from textloc_utils import edit, ocr
    from textloc_utils.experiment import known_layers

    if args.image and args.noises > 1:
        raise TextlocError("a given picture has only one noise, which is found by inversion; omit --noises or --image")
    spec = options.spec_of(args)
    pair = replace(edit.check_text(spec, args.prompt, args.to), seed=args.seed)
    if args.start >= spec.steps:
        raise TextlocError(f"step {args.start} is out of range; this model's steps are 0 to {spec.steps - 1}")
    picture = edit.open_picture(args.image, spec) if args.image else None
    reader = ocr.check_reader(spec.height, [pair.source_text, pair.target_text])
    model = options.loaded(args, spec)
    method = edit.localized(args.layers or known_layers(model), args.start)
    run, reports = options.experiment(args, model), []
    for i in range(args.noises):
        mine = replace(pair, seed=args.seed + i)
        before, after, report = edit.report(run, mine, method, picture)
        reports.append(report)
        folder = args.out if args.noises == 1 else args.out / f"seed-{mine.seed}"
        edit.save(folder, before, after, reports[-1])
        if not args.json:
            read = [report[name] or "(nothing read)" for name in ("before", "after")]
            kept = f"SSIM outside the text {report['ssim_outside']:.2f}"
            print(f"{folder / 'edit.png'}  {read[0]} -> {read[1]}  {kept}, read by {reader}")
    if args.json:
        print(json.dumps(reports[0] if args.noises == 1 else reports, indent=1, ensure_ascii=False))
    failures = [report["failure"] for report in reports if report["failure"]]
    if failures:
        more = f" (and {len(failures) - 1} more of {args.noises} noises)" if failures[1:] else ""
        print(f"textloc: {failures[0]}{more}", file=sys.stderr)
        return FAILED
    return 0
