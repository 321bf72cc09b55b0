"""The sweep: patch every site in every pair of prompts, read the text in the pictures, and summarise the scores.

The **text effect** of a patch on a pair is its target score (``metrics.text_score``) minus the pair's floor. The floor
is the score of the source's text against the target's text, because two words share letters by chance. So a picture
that kept its text has an effect of 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from diffusers import DiffusionPipeline

from textloc_utils import metrics, ocr, onestep, scene_pairs, sites
from textloc_utils.experiment import Experiment, check_pairs
from textloc_utils.generate import rows_per_call
from textloc_utils.models import Model, check_layers
from textloc_utils.prompts import Pair
from textloc_utils.scene_pairs import ScenePair
from textloc_utils.sites import SOURCE, TARGET, Site, token_groups

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS = 5  #: part of a stored unit's key: raise it whenever the rows of a unit change
SCORES = ("target_score", "source_score", "exact", "ssim_outside", "psnr_outside")


# --- the sweep ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Sweep:
    """What a sweep found. ``table`` has one row per pair and picture, with the columns of :func:`patch_pair`."""

    experiment: Experiment
    pairs: list[Pair]
    sites: list[Site]
    table: pd.DataFrame

    def summary(self) -> pd.DataFrame:
        """One row per site, see :func:`summarise`."""
        return summarise(self.table)

    def __repr__(self) -> str:
        short = self.summary()[["site", "target_score", "source_score", "ssim_outside"]]
        told = short.to_string(index=False, float_format="{:.2f}".format)
        return f"{self.experiment.name}, means over {len(self.pairs)} pairs\n{told}"

    def show(self, pair: int = 0) -> "Figure":
        """Draw a pair again: its source, its target, and the picture patched at each site, with the text OCR reads."""
        from textloc_utils.book import plots

        pictures, rows = patch_pair(self.experiment, self.pairs[pair], self.sites)
        return plots.pictures(pictures, [f"{row['site']}: {row['read'] or 'nothing'}" for row in rows])


def sweep(
    subject: Experiment | Model | DiffusionPipeline,
    pairs: Sequence[Pair],
    *,
    sites: Sequence[Site] | None = None,
    **settings,
) -> Sweep:
    """Patch every site (default: ``sites.single_layers``) in every pair.

    ``settings`` are those of ``experiment.Experiment``: steps, guidance, negative_prompt, store, progress. Raises
    TextlocError for invalid pairs, layers or settings before anything is drawn.

    >>> pair = Pair.of('A sign that says "HELLO".', "WORLD", seed=1)
    >>> found = sweep(pipe, [pair], sites=[Site(kind="layer", layers=2), Site(kind="layer", layers=3)], steps=2)
    >>> found.summary().site.tolist()
    ['source', 'target', 'layer 2', 'layer 3']
    """
    experiment, pairs = Experiment.of(subject, **settings), check_pairs(pairs)
    chosen = _sites(experiment, sites)
    return Sweep(experiment=experiment, pairs=pairs, sites=chosen, table=table(experiment, pairs, chosen))


def table(
    experiment: Experiment, pairs: Sequence[Pair], sites: Sequence[Site] | None = None, *, source: bool = True
) -> pd.DataFrame:
    """The table of a :func:`sweep`. Each pair is a unit of the store. ``source`` is as in :func:`patch_pair`."""
    chosen = _sites(experiment, sites)
    inputs = {"rows": ROWS, "sites": chosen, "source": source}

    def compute(pair: Pair) -> list[dict]:
        return patch_pair(experiment, pair, chosen, source=source)[1]

    return experiment.units("sweep", check_pairs(pairs), inputs, compute)


def patch_pair(
    experiment: Experiment,
    pair: Pair,
    sites: Sequence[Site] | None = None,
    *,
    source: bool = True,
    batch_size: int | None = None,
) -> tuple[np.ndarray, list[dict]]:
    """Draw one pair: the source, the target, and the source patched at each site, ``batch_size`` rows at a time.

    One target row serves all patched rows of a batch. Every batch draws it again. With ``source=False``, the plain
    source is not drawn, and the columns that compare with it are missing.

    Returns the pictures, uint8 (pictures, H, W, 3), and one row per picture. The columns of a row are: model, the
    pair's seed and texts, the columns of its site (``sites.COLUMNS``), read (by OCR), target_score and source_score
    (``metrics.text_score``, 0..1), floor (the score of the source's text against the target's), exact (whether the
    picture spells the target), ssim_outside and psnr_outside (compared with the plain source, outside the text; PSNR is
    capped at 60 dB), and row_evaluations (the pair's number, divided evenly among its pictures).

    For a ``ScenePair``, a row also has the columns of its ``about``, and the value that is read for every factor. If
    its two texts are equal, the scores and ``exact`` say whether the factor that differs is read as the target's value
    or as the source's value.
    """
    model, chosen = experiment.model, _sites(experiment, sites)
    todo = ([SOURCE] if source else []) + chosen
    room = max(1, (batch_size or rows_per_call(model)) - 1)
    tokens = token_groups(model, pair) if any(site.tokens for site in chosen) else None
    drawn, cost = [], 0
    for start in range(0, max(1, len(todo)), room):
        part = todo[start : start + room]
        sources = [(1 + i, site) for i, site in enumerate(part) if site is not SOURCE]
        patches = [patch for row, site in sources for patch in site.patches(row, 0, tokens)]
        texts = [pair.target] + [pair.source] * len(part)
        made = experiment.draw(texts, [pair.seed] * len(texts), patches=patches)
        drawn += list(made.images[1:] if start else made.images)
        cost += made.row_evaluations
    pictures = np.stack([*drawn[1:2], drawn[0], *drawn[2:]] if source else drawn)
    shown = ([SOURCE] if source else []) + [TARGET, *chosen]
    looked: list[dict[str, str]] = [{}] * len(pictures)
    mask = None
    if isinstance(pair, ScenePair):
        looked, mask = scene_pairs.seen(pictures, pair)
    rows = [
        {
            "model": experiment.name,
            "seed": pair.seed,
            **(pair.about if isinstance(pair, ScenePair) else {}),
            "source_text": pair.source_text,
            "target_text": pair.target_text,
            **site.columns(experiment.steps),
            "read": text,
            **_scores(pair, text, seen),
            "row_evaluations": cost / len(pictures),
        }
        for site, text, seen in zip(shown, ocr.read(pictures), looked, strict=True)
    ]
    if source:
        mask = scene_pairs.outside_text(model, pictures, pair) if mask is None else mask
        plain = np.broadcast_to(pictures[:1], pictures.shape)
        ssim = metrics.ssim(pictures, plain, mask)
        psnr = metrics.psnr(pictures, plain, mask, cap=metrics.PSNR_CAP)
        for row, a, b in zip(rows, ssim, psnr, strict=True):
            row |= {"ssim_outside": float(a), "psnr_outside": float(b)}
    for row, seen in zip(rows, looked, strict=True):
        row |= seen
    return pictures, rows


def _scores(pair: Pair, text: str, seen: dict[str, str]) -> dict:
    """How close a picture is to both prompts, by its text or by the factor in which the prompts differ."""
    if not isinstance(pair, ScenePair) or pair.source_text != pair.target_text:
        return {
            "target_score": metrics.text_score(text, pair.target_text),
            "source_score": metrics.text_score(text, pair.source_text),
            "floor": metrics.text_score(pair.source_text, pair.target_text),
            "exact": metrics.exact_match(text, pair.target_text),
        }
    [name], value = pair.differs, seen[f"{pair.differs[0]}_read"]
    source, target = getattr(pair.scene, name), getattr(pair.target_scene, name)
    return {"target_score": float(value == target), "source_score": float(value == source), "floor": 0.0} | {
        "exact": value == target
    }


def cheap(experiment: Experiment, pairs: Sequence[Pair], *, depth: str = "one-step") -> pd.DataFrame:
    """The table of ``onestep.effects``. Each pair is a unit of the store, as in :func:`table`."""
    onestep.check_depth(depth)
    inputs = {"rows": ROWS, "depth": depth, "levels": onestep.LEVELS}

    def compute(pair: Pair) -> pd.DataFrame:
        return onestep.effects(experiment.model, [pair], depth=depth, **experiment.settings)

    return experiment.units("effects", check_pairs(pairs), inputs, compute)


def _sites(experiment: Experiment, chosen: Sequence[Site] | None) -> list[Site]:
    chosen = sites.single_layers(experiment.model) if chosen is None else list(chosen)
    for site in chosen:
        check_layers(experiment.model, site.layers)
    return chosen


# --- what a table says ----------------------------------------------------------------------------------------


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """One row per site, in the sweep's order: ``sites.COLUMNS``, n, and SCORES as in ``metrics.summarise``."""
    return metrics.summarise(table, sites.COLUMNS, SCORES)


def effect_intervals(table: pd.DataFrame) -> pd.DataFrame:
    """Mean text effect per site with its 95 % interval. Columns: those of ``sites.COLUMNS``, n, mean, low, high."""
    patched = table[~table.kind.isin([SOURCE.kind, TARGET.kind])]
    effects = metrics.summarise(_with_effect(patched), sites.COLUMNS, ["effect"])
    return effects.set_axis([*sites.COLUMNS, "n", "mean", "low", "high"], axis=1)


def set_effects(table: pd.DataFrame, by: str = "score") -> pd.DataFrame:
    """Effects of sets of layers: one row per pair (its seed), one column per set, NaN if the set was not drawn.

    The name of a column is the set's layers, joined by spaces. The column of the all-layer patch is "all". The effects
    are text effects. With ``by="exact"`` they are 1 if the whole target was drawn and 0 otherwise.
    """
    patched = table[table.kind.isin(["layer", "set", "all"])]
    named = patched.layers.where(patched.kind != "all", "all")
    effects = patched.assign(effect=patched.exact.astype(float)) if by == "exact" else _with_effect(patched)
    return effects.assign(set=named).pivot(index="seed", columns="set", values="effect")


def layer_table(table: pd.DataFrame) -> pd.DataFrame:
    """Effects of single layers, pairs x layers, from a table of :func:`sweep` or of :func:`cheap`."""
    if "depth" not in table:
        table = _with_effect(table[table.kind == "layer"]).rename(columns={"layers": "layer"}).astype({"layer": int})
    return table.pivot_table("effect", "seed", "layer", aggfunc="mean")


def _with_effect(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(effect=table.target_score - table.floor)
