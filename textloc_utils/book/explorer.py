"""The files of the book's layer explorer: pictures of a few pairs of each model, with every layer patched once.

Each model has a table ``data/results/explorer/MODEL.csv`` with a JSON file of its provenance, and one picture file per
pair. A picture file has all pictures of the pair below each other, in the order of the table's rows.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from textloc_utils import files, sweeps
from textloc_utils.experiment import Experiment, Spent, check_pairs, digest_of
from textloc_utils.generate import decode, encode
from textloc_utils.prompts import Pair
from textloc_utils.results import Store
from textloc_utils.settings import data_dir

#: The columns of ``sweeps.patch_pair``'s table that the explorer shows with each picture.
COLUMNS = ["model", "seed", "prompt", "source_text", "target_text", "site", "kind", "layers", "read"]
COLUMNS += ["target_score", "source_score", "exact", "ssim_outside"]
SUFFIX = ".webp"


def store() -> Store:
    """The store with the explorer's files."""
    return Store(data_dir() / "results" / "explorer")


def sprite_path(model: str, seed: int) -> Path:
    """The file with all pictures of the pair with this seed, below each other."""
    return store().root / f"{model}_{seed}{SUFFIX}"


def publish(experiment: Experiment, pairs: Sequence[Pair]) -> pd.DataFrame:
    """Draw the pairs at every site of a sweep (``sites.single_layers``) and write the explorer's files of a model.

    Returns the table, with one row per pair and picture. Each pair is a unit of the result store, so a killed run
    resumes where it stopped. Files are first written elsewhere and then renamed. The table comes last, so it never
    names pictures that do not exist.
    """
    pairs, name, spec = check_pairs(pairs), experiment.name, experiment.model.spec
    spent = Spent(experiment.store)
    table = experiment.units("explorer", pairs, {"rows": sweeps.ROWS}, lambda pair: _draw(experiment, pair))
    for seed, rows in table.groupby("seed", sort=False):
        _write_sprite(sprite_path(name, seed), [decode(text) for text in rows.picture])
    table, key = table[COLUMNS], experiment.key | {"rows": sweeps.ROWS, "pairs": digest_of(pairs)}
    about = {"key": key, "height": spec.height, "width": spec.width, "seconds": spent.seconds}
    store().publish(name, table, about, model=experiment.model)
    for old in store().root.glob(f"{name}_*{SUFFIX}"):  # files of pairs that are no longer shown
        if old not in {sprite_path(name, pair.seed) for pair in pairs}:
            old.unlink()
    return table


def _draw(experiment: Experiment, pair: Pair) -> list[dict]:
    pictures, rows = sweeps.patch_pair(experiment, pair)
    return [
        row | {"prompt": pair.source, "picture": encode(picture)} for row, picture in zip(rows, pictures, strict=True)
    ]


def _write_sprite(path: Path, pictures: Sequence[np.ndarray]) -> None:
    """Write all pictures below each other into one file, without loss."""
    with files.whole_file(path) as part:
        Image.fromarray(np.concatenate(list(pictures))).save(part, "WEBP", lossless=True, method=6)
