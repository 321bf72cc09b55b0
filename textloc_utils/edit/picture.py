"""Edit one picture for a user: check the request, make the edit, and report the result."""

import json
import struct
from pathlib import Path

import numpy as np
import pandas as pd
from diffusers import DiffusionPipeline
from PIL import ExifTags, Image, ImageOps

from textloc_utils import files, metrics, ocr, scene_pairs
from textloc_utils.edit.inversion import check_picture, invert
from textloc_utils.edit.method import Method, edit
from textloc_utils.experiment import Experiment
from textloc_utils.generate import check_seeds
from textloc_utils.miniatures import world
from textloc_utils.models import Model, ModelSpec, check_distinct, check_layers, check_prompts
from textloc_utils.prompts import LETTERS, Pair, quoted_text
from textloc_utils.settings import TextlocError

#: SSIM outside the text below which the picture counts as lost.
KEPT = 0.7


def check_text(spec: ModelSpec, prompt: str, text: str) -> Pair:
    """The pair of prompts, with seed 0, that replaces a prompt's quoted text by ``text``.

    Raises TextlocError if the prompt does not have exactly one quoted text, or if the new text is empty, too long,
    equal to the old text, or has characters that the model cannot draw.
    """
    old = quoted_text(prompt)
    if not text.strip():
        raise TextlocError("the new text is empty; give at least one letter")
    if wrong := [c for c in text if c in '"\u201c\u201d' or not c.isprintable()]:
        raise TextlocError(
            f"the new text cannot have {wrong[0]!r}; allowed: printable characters without double quotes"
        )
    if spec.miniature:
        if wrong := [c for c in text if c not in LETTERS]:
            raise TextlocError(f"{spec.name} cannot draw {wrong[0]!r}; its letters are the capitals A to Z")
        if len(text) > world.COLUMNS:
            raise TextlocError(f"the new text {text!r} is too long; a sign has room for {world.COLUMNS} letters")
    if text == old:
        raise TextlocError(f"the new text is equal to the old text, {old!r}; there is nothing to edit")
    return Pair.of(prompt, text)


def open_picture(path: str | Path, spec: ModelSpec) -> np.ndarray:
    """Read a picture file as uint8 (H, W, 3), rotated as the file says, with transparent parts on white.

    16-bit grey is scaled to 8 bits. Raises TextlocError for a file that cannot be read, has several pictures, has 32
    bits per channel, or does not have the model's size.
    """
    try:
        with Image.open(path) as file:
            turned = file.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            check_picture(spec, *(file.size if turned else file.size[::-1]))
            if getattr(file, "n_frames", 1) > 1:
                raise TextlocError(f"{path} has {file.n_frames} pictures; save only the one that you want to edit")
            upright = ImageOps.exif_transpose(file)
            if upright.mode.startswith("I;16"):
                return np.repeat(np.rint(np.asarray(upright)[..., None] / 257).astype(np.uint8), 3, axis=2)
            if upright.mode in ("I", "F"):
                raise TextlocError(f"{path} has 32 bits per channel; save it with 8 or 16 bits")
            if upright.has_transparency_data:
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright.convert("RGBA"))
            return np.array(upright.convert("RGB"))
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "Pillow does not know this format"
        raise TextlocError(f"cannot read a picture from {path}: {reason}") from None


def picture_scores(pictures: np.ndarray, source: np.ndarray, outside: np.ndarray) -> list[dict[str, float]]:
    """Measure how much of a source picture (H, W, 3) each picture (n, H, W, 3) keeps, as a whole and outside the text.

    The keys are ssim, psnr (capped at 60 dB) and mse, each also with ``_outside``. ``outside`` is boolean, (H, W) or
    (n, H, W), and True outside the text.
    """
    plain = np.broadcast_to(source, pictures.shape)
    parts = {"": None, "_outside": outside}
    columns = {}
    for end, mask in parts.items():
        columns[f"ssim{end}"] = metrics.ssim(pictures, plain, mask)
        columns[f"psnr{end}"] = metrics.psnr(pictures, plain, mask, cap=metrics.PSNR_CAP)
        columns[f"mse{end}"] = metrics.mse(pictures, plain, mask)
    return pd.DataFrame(columns).to_dict("records")


def failure(before: str, after: str, pair: Pair, ssim_outside: float, *, found: bool = False) -> str | None:
    """Say in one line what is wrong with an edit. Returns None if it has the new text and the picture was kept.

    ``before`` and ``after`` are the texts that are read in the two pictures. ``found`` says if the second picture has
    any text.
    """
    if ssim_outside < KEPT:
        return f"the picture was lost: outside the text, its SSIM to the old one is {ssim_outside:.2f}, below {KEPT}"
    if metrics.exact_match(after, pair.target_text):
        return None
    if not after:
        return f"no text is read{', although there is some' if found else ''}; wanted: {pair.target_text}"
    if metrics.exact_match(after, before):
        return f"nothing changed: the picture still says {after}"
    return f"the picture says {after}, not {pair.target_text}"


def report(
    subject: Experiment | Model | DiffusionPipeline,
    pair: Pair,
    method: Method,
    picture: np.ndarray | None = None,
    **settings,
) -> tuple[np.ndarray, np.ndarray, dict]:
    """Edit the picture of the pair's seed, or a given ``picture`` uint8 (H, W, 3).

    ``settings`` are those of ``experiment.Experiment``. Returns the pictures before and after, and a report. The
    report's keys are source, target, seed, method, layers, start, before and after (the texts that OCR reads), reader
    (its name and version), failure (:func:`failure`), the keys of :func:`picture_scores`, row_evaluations and seconds
    (both include an inversion). For a given picture there is also round_trip, the scores of the picture that the source
    prompt draws from the inverted noise.
    """
    run, found = Experiment.of(subject, **settings), None
    model = run.model
    check_seeds([pair.seed])
    check_prompts(model, [pair.source, pair.target])
    check_distinct(model, [pair])
    check_layers(model, method.patch.layers if method.patch is not None else ())
    last = run.steps - 1
    if method.patch is not None and not 0 <= method.patch.start <= last:
        raise TextlocError(f"step {method.patch.start} is out of range; this model's steps are 0 to {last}")
    if picture is not None:
        found = invert(model, picture[None], [pair.source], steps=run.steps)
    made = edit(run, pair, method, noise=found and found.noise)
    before = made.before if picture is None else picture
    seen = ocr.readings([before, made.after])
    read = [reading.joined for reading in seen]
    outside = scene_pairs.outside_text(model, np.stack([before, made.after, made.before]), pair)
    outside = outside[1:] if outside.ndim == 3 else outside
    scores, round_trip = picture_scores(np.stack([made.after, made.before]), before, outside)
    about = {
        "source": pair.source,
        "target": pair.target,
        "seed": pair.seed,
        "method": method.name,
        "layers": list(method.patch.layers if method.patch is not None else ()),
        "start": method.patch.start if method.patch is not None else 0,
        "before": read[0],
        "after": read[1],
        "failure": failure(read[0], read[1], pair, scores["ssim_outside"], found=seen[1].found),
        "reader": seen[1].reader,
        **scores,
        "row_evaluations": made.row_evaluations + (found.row_evaluations if found else 0),
        "seconds": made.seconds + (found.seconds if found else 0.0),
    }
    return before, made.after, about | ({"round_trip": round_trip} if found else {})


def side_by_side(before: np.ndarray, after: np.ndarray, gap: int = 4) -> np.ndarray:
    """Before, after and their absolute difference in one picture, uint8 (H, 3 W + 2 gap, 3)."""
    difference = np.abs(after.astype(int) - before).astype(np.uint8)
    space = np.full((before.shape[0], gap, 3), 255, np.uint8)
    return np.concatenate([before, space, after, space, difference], axis=1)


def save(folder: Path, before: np.ndarray, after: np.ndarray, about: dict) -> None:
    """Write before.png, after.png, edit.png (both and their difference side by side) and edit.json (the report).

    Every file is first written elsewhere and then renamed. The report is renamed last.
    """
    pictures = {"before.png": before, "after.png": after, "edit.png": side_by_side(before, after)}
    with files.whole_files(folder, *pictures, "edit.json") as aside:
        for name, picture in pictures.items():
            Image.fromarray(picture).save(aside / name)
        (aside / "edit.json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n")
