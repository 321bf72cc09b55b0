"""What the book's layer explorer shows: a few pairs of each model, drawn once with every layer patched, as files.

For each model there is a table ``data/results/explorer/MODEL.csv``, with its provenance beside it, and one picture file
per pair: all pictures of the pair below each other, in the order of the table's rows.
"""

import base64
import io
import os
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm.auto import tqdm

from textloc_utils import localize
from textloc_utils.models import Model
from textloc_utils.prompts import Pair
from textloc_utils.results import Store
from textloc_utils.settings import TextlocError, data_dir

#: Of the table of ``localize.patch_pair``, what the explorer tells beside each picture.
COLUMNS = ["model", "seed", "wall", "sign", "source_text", "target_text", "site", "read"]
COLUMNS += ["target_score", "source_score", "ssim_outside"]
SUFFIX = ".webp"


def store() -> Store:
    """Where the explorer's files lie."""
    return Store(data_dir() / "results" / "explorer")


def sprite_path(model: str, seed: int) -> Path:
    """The file that holds all pictures of the pair with this seed, below each other."""
    return store().root / f"{model}_{seed}{SUFFIX}"


def publish(model: Model, pairs: Sequence[Pair], *, progress: bool = False) -> pd.DataFrame:
    """Draw the pairs at every site of a sweep (``localize.single_layers``) and write the explorer's files of a model.

    Returns the table, one row per pair and picture. Each pair is a unit of the result store: a killed run goes on where
    it was. Files are written aside and renamed, the table last, so that it never names pictures that are not there.
    """
    if not pairs:
        raise TextlocError("the explorer needs at least one pair of prompts")
    key = localize.published_key(model, pairs, None)
    shared = {k: key[k] for k in key if k != "pairs"} | {"model": model.spec.name}
    units = [
        Store().unit("explorer", shared | {"pair": asdict(pair)}, lambda pair=pair: _draw(model, pair), model=model)
        for pair in tqdm(pairs, desc=f"{model.spec.name}: pairs", unit="pair", disable=not progress)
    ]
    store().root.mkdir(parents=True, exist_ok=True)
    drawn = [sprite_path(model.spec.name, pair.seed) for pair in pairs]
    for path, unit in zip(drawn, units, strict=True):
        _write_sprite(path, [_decode(text) for text in unit.picture])
    table = pd.concat(units, ignore_index=True)[COLUMNS]
    about = {"key": key, "height": model.spec.height, "width": model.spec.width}
    store().publish(model.spec.name, table, about)
    for old in store().root.glob(f"{model.spec.name}_*{SUFFIX}"):  # of pairs that are not shown any more
        if old not in drawn:
            old.unlink()
    return table


def _draw(model: Model, pair: Pair) -> list[dict]:
    pictures, rows = localize.patch_pair(model, pair, localize.single_layers(model))
    return [row | {"picture": _encode(picture)} for row, picture in zip(rows, pictures, strict=True)]


def _encode(picture: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _decode(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def _write_sprite(path: Path, pictures: Sequence[np.ndarray]) -> None:
    """All pictures below each other in one file, without loss."""
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        Image.fromarray(np.concatenate(list(pictures))).save(scratch, "WEBP", lossless=True, method=6)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
