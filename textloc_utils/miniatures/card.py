"""Ship a trained miniature: weights, what the registry needs to know, and the model card."""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file

from textloc_utils import metrics, models, ocr, prompts
from textloc_utils.book import plots
from textloc_utils.generate import generate
from textloc_utils.miniatures.training import recipe, write_json
from textloc_utils.settings import TextlocError, check_writable, quiet_libraries

WORDS = 200


def spelling(model: models.Model, n: int = WORDS) -> dict:
    """Tesseract's reading of ``n`` held-out words in all colours: exact-match and character error rate.

    The words, seeds and colours are those of :func:`textloc_utils.prompts.spelling_prompts`.
    """
    todo = prompts.spelling_prompts(n)
    made = generate(model, [p for p, _, _ in todo], [s for _, _, s in todo])
    read = ocr.read(made.images)
    exact = metrics.rate([metrics.exact_match(r, w) for r, (_, w, _) in zip(read, todo, strict=True)])
    error = metrics.bootstrap([metrics.character_error_rate(r, w) for r, (_, w, _) in zip(read, todo, strict=True)])
    return {
        "words": n,
        "exact": round(exact.mean, 4),
        "exact_interval": [round(exact.low, 4), round(exact.high, 4)],
        "cer": round(error.mean, 4),
        "cer_interval": [round(error.low, 4), round(error.high, 4)],
    }


def check_destination(folder: str | Path) -> Path:
    """A folder that a miniature can be shipped to; TextlocError for one that holds anything but a miniature."""
    folder = check_writable(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "textloc.json").is_file():
        raise TextlocError(f"{folder} holds something that is no miniature; name another folder with --ship")
    return folder


def export(name: str, run: Path, destination: Path) -> dict:
    """Copy a finished run's pipeline to ``destination``, measure its spelling, write textloc.json and the card.

    The denoiser is stored in half precision (a few megabytes; it is computed in float32). A miniature that was there is
    replaced (see :func:`check_destination`). Returns textloc.json.
    """
    check_destination(destination)
    if not (run / "pipeline" / "model_index.json").is_file():
        raise TextlocError(f"no finished pipeline in {run}; run `textloc train {name}` to the end first")
    quiet_libraries()
    report = json.loads((run / "report.json").read_text())
    evaluations = json.loads((run / "evaluations.json").read_text())
    part = destination.with_name(destination.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(run / "pipeline", part)
    for file in part.rglob("diffusion_pytorch_model.safetensors"):
        if file.parent.name in ("transformer", "unet"):
            save_file({k: v.half() for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    for file in part.rglob("config.json"):  # the library notes where a part was loaded from: a path of this machine
        write_json(file, {k: v for k, v in json.loads(file.read_text()).items() if k != "_name_or_path"})
    known = {**recipe(name).SPEC, "prompt_template": prompts.TEMPLATE, "colours": list(prompts.COLOURS)}
    known["trained"] = {"device": report["device"], "samples": report["samples"], "spelling": None}
    write_json(part / "textloc.json", known)
    known["trained"]["spelling"] = spelling(models.load(name, device="cpu", model_path=part))
    write_json(part / "textloc.json", known)
    log = {"report": report, "evaluations": evaluations}
    write_json(part / "training.json", log)
    plots.training_curves({name: log}).savefig(part / "training.png", dpi=110)
    (part / "README.md").write_text(_card(name, known, report, evaluations))
    old = destination.with_name(destination.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if destination.exists():
        destination.rename(old)
    part.rename(destination)
    shutil.rmtree(old, ignore_errors=True)
    return known


def _spent(report: dict) -> str:
    return (
        f"{report['samples']:,} samples in {report['step']:,} steps of {report['budget']['batch']}, "
        f"{report['seconds'] / 60:.0f} minutes"
    )


def _card(name: str, known: dict, report: dict, evaluations: list[dict]) -> str:
    spelled, budget, vae = known["trained"]["spelling"], report["budget"], report["autoencoder"]
    low, high = spelled["exact_interval"]
    curriculum = ", then ".join(
        f"{' and '.join(map(str, lengths))} from {at:.0%} of the budget" for at, lengths in budget["curriculum"]
    )
    facts = {
        "data": "scenes rendered by this project: 8 wall and sign colours, 3 shapes, words and random strings of "
        "3 to 6 capitals in DejaVu Sans Mono Bold; "
        + (f"{budget['pool']:,} scenes encoded once" if vae else "drawn anew for every step"),
        "held out": f"{len(prompts.words('held-out'))} words, drawn in training neither as words nor as random strings",
        "text encoders": recipe(name).ENCODERS,
        "device": f"{report['device']}, {report['processes']} process(es), {report['precision']}, "
        f"torch {report['torch']}",
        "budget": _spent(report)
        + (f"; autoencoder {vae['seconds'] / 60:.0f} minutes, {vae['psnr_db']} dB" if vae else "")
        + (f"; stage II {_spent(report['stage2'])}" if "stage2" in report else "")
        + (
            f"; started from weights that had seen {report['before']['samples']:,} samples"
            if "before" in report
            else ""
        ),
        "curriculum": "letters in a word: " + curriculum,
        "seed": report["seed"],
        "spelling": f"{spelled['words']} held-out words read by Tesseract: {spelled['exact']:.3f} exact "
        f"(95 % interval {low:.3f} to {high:.3f}), character error rate {spelled['cer']:.3f}",
        "sampling": f"{known['steps']} steps, guidance {known['guidance']}",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    rows = "\n".join(
        f"| {e['samples']:,} | {e['exact']:.2f} | {e['characters']:.2f} | {e['all_layers']:.2f} | "
        f"{int(np.argmax(e['target']))} ({max(e['target']):.2f}) |"
        for e in evaluations
    )
    return f"""---
library_name: diffusers
license: mit
pipeline_tag: text-to-image
---
# {name}

A small {known["pipeline"]} that draws a word on a sign on a wall, {known["height"]}x{known["width"]} pixels, trained
from scratch by `textloc train {name}`. It exists to study where such a model keeps the text it draws, and draws
nothing else. Licence: MIT.

| | |
|---|---|
{table}

![Loss and spelling against samples](training.png)

Evaluations during training, read by template matching; the last two columns are target letters spelled when every
text layer, and when the best single one, is patched:

| samples | whole words | characters | all layers | best layer |
|---|---|---|---|---|
{rows}
"""
