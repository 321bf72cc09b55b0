"""Which layers hold the text: patch each text layer alone, and read what the picture says (paper, section 3)."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from textloc_utils import metrics, ocr
from textloc_utils.generate import generate
from textloc_utils.models import Model, check_layers
from textloc_utils.patching import Patch
from textloc_utils.prompts import Pair
from textloc_utils.results import Store
from textloc_utils.settings import TextlocError

ROWS = 2  #: part of a stored unit's key: raised whenever its rows change
PSNR_CAP = 60.0  #: dB; two identical pictures would be infinitely alike


def fingerprint(model: Model) -> str:
    """Short hash of a denoiser's weights (64 values of each tensor): retraining makes stored results stale."""
    digest = hashlib.sha256()
    for name, tensor in model.denoiser.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def single_layers(model: Model) -> dict[str, tuple[tuple[int, ...], bool]]:
    """The sites of a sweep, name to (layers, pooled): each layer alone, all layers, the pooled text, and everything."""
    every = tuple(range(len(model.layers)))
    sites = {f"layer {i}": ((i,), False) for i in every} | {"all layers": (every, False)}
    if model.pooled_site is not None:
        sites |= {"pooled": ((), True), "all layers + pooled": (every, True)}
    return sites


def outside_text(model: Model, height: int, width: int) -> np.ndarray:
    """Boolean (height, width), True outside the region where the model's letters can stand (its ``text_box``)."""
    mask = np.ones((height, width), bool)
    if model.spec.text_box is not None:
        left, top, right, bottom = model.spec.text_box
        mask[top:bottom, left:right] = False
    return mask


def patch_pair(
    model: Model, pair: Pair, sites: dict[str, tuple[tuple[int, ...], bool]], *, steps: int | None = None
) -> tuple[np.ndarray, list[dict]]:
    """Draw one pair: the source, the target, and the source patched at each site, all in one batch.

    Returns the pictures, uint8 (2 + sites, H, W, 3), and one row per picture: site, layers (indices joined by
    spaces), pooled, read (by OCR), target_score and source_score (``metrics.text_score``, 0..1), exact (spells
    the target), ssim_outside and psnr_outside (to the plain source, outside the text box; PSNR capped at 60 dB).
    """
    for layers, _ in sites.values():
        check_layers(model, layers)
    prompts = [pair.source, pair.target] + [pair.source] * len(sites)
    patches = [
        Patch(source=2 + i, target=1, layers=layers, pooled=pooled) for i, (layers, pooled) in enumerate(sites.values())
    ]
    made = generate(model, prompts, [pair.seed] * len(prompts), patches=patches, steps=steps)
    pictures = made.images
    mask = outside_text(model, *pictures.shape[1:3])
    source = np.broadcast_to(pictures[:1], pictures.shape)
    ssim = metrics.ssim(pictures, source, mask)
    psnr = metrics.psnr(pictures, source, mask, cap=PSNR_CAP)
    names = {"source": ((), False), "target": ((), False), **sites}
    rows = []
    for i, ((site, (layers, pooled)), text) in enumerate(zip(names.items(), ocr.read(pictures), strict=True)):
        rows.append(
            {
                "model": model.spec.name,
                "seed": pair.seed,
                "wall": pair.wall,
                "sign": pair.sign,
                "source_text": pair.source_text,
                "target_text": pair.target_text,
                "site": site,
                "layers": " ".join(map(str, layers)),
                "pooled": pooled,
                "read": text,
                "target_score": metrics.text_score(text, pair.target_text),
                "source_score": metrics.text_score(text, pair.source_text),
                "exact": metrics.exact_match(text, pair.target_text),
                "ssim_outside": float(ssim[i]),
                "psnr_outside": float(psnr[i]),
                "row_evaluations": made.row_evaluations // len(prompts),
            }
        )
    return pictures, rows


def sweep(
    model: Model,
    pairs: Sequence[Pair],
    *,
    sites: dict[str, tuple[tuple[int, ...], bool]] | None = None,
    steps: int | None = None,
    store: Store | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Patch every site (default: :func:`single_layers`) in every pair; one row per pair and site.

    Columns as :func:`patch_pair`. Each pair is a unit of the store, so that a killed sweep goes on where it was.
    """
    if not pairs:
        raise TextlocError("a sweep needs at least one pair of prompts")
    sites = single_layers(model) if sites is None else sites
    store = Store() if store is None else store
    weights = fingerprint(model)
    tables = []
    for pair in tqdm(pairs, desc=f"{model.spec.name}: pairs", unit="pair", disable=not progress):
        inputs = {
            "model": model.spec.name,
            "weights": weights,
            "rows": ROWS,
            "pair": asdict(pair),
            "sites": sites,
            "steps": steps or model.spec.steps,
            "guidance": model.spec.guidance,
        }
        tables.append(store.unit("sweep", inputs, lambda pair=pair: patch_pair(model, pair, sites, steps=steps)[1]))
    return pd.concat(tables, ignore_index=True)


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Mean, 95 % interval and n per site, in the sweep's order.

    Columns: site, and for each of target_score, source_score, exact, ssim_outside, psnr_outside the mean under
    that name, ``_low`` and ``_high``; n pairs.
    """
    rows = []
    for site, part in table.groupby("site", sort=False):
        row = {"site": site}
        for score in ("target_score", "source_score", "exact", "ssim_outside", "psnr_outside"):
            interval = metrics.bootstrap(part[score].astype(float).to_numpy())
            row |= {score: interval.mean, f"{score}_low": interval.low, f"{score}_high": interval.high}
        rows.append(row | {"n": len(part)})
    return pd.DataFrame(rows)
