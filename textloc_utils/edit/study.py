"""The editing chapter's measurements: every method edits pairs of prompts, and tables summarise the results."""

import functools
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from textloc_utils import metrics, ocr, scene_pairs
from textloc_utils.edit.inversion import DAMPED, PASSES, invert
from textloc_utils.edit.method import (
    LOCALIZED,
    P2P,
    P2P_OWN,
    PLAIN,
    SAME_SEED,
    Method,
    all_layers,
    edit,
    flow_edit,
    localized,
    plain_target,
    prompt_to_prompt,
    prompt_to_prompt_own,
    same_seed,
)
from textloc_utils.edit.picture import picture_scores
from textloc_utils.experiment import Experiment, digest_of
from textloc_utils.miniatures import world
from textloc_utils.models import Model, as_indices, check_layers
from textloc_utils.prompts import Pair, with_noises
from textloc_utils.scene_pairs import ScenePair
from textloc_utils.settings import Preset, TextlocError

ROWS = 1  #: part of a stored unit's key: raise it whenever the rows of a unit change
#: Settings along a trade-off curve: shares of the steps after which a patch begins, or up to which maps are replaced.
STARTS, SHARES = (0.0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8), (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
ROUND_TRIP = "round trip"
LOSS = 0.05  #: allowed loss of the exact rate, see :func:`best`
TUNING = 48  #: largest number of pairs that choose the settings; fewer are used if fewer pairs are reported


def rendered(pair: Pair) -> np.ndarray:
    """A rendered picture of the pair's source prompt, uint8 (H, W, 3). It is not drawn by a model."""
    if not isinstance(pair, ScenePair):
        raise TextlocError("given pictures are rendered from scenes of a miniature's world; this pair has no scene")
    return world.render(pair.scene)


@torch.no_grad()
def compare_pair(
    subject: Experiment | Model | DiffusionPipeline,
    pair: Pair,
    methods: Sequence[Method],
    *,
    given: bool = False,
    **settings,
) -> tuple[np.ndarray, list[dict]]:
    """Edit one pair's picture with each method, each in a separate batch. ``settings`` are as in ``Experiment``.

    The picture is drawn from the source prompt. With ``given``, it is rendered (:func:`rendered`) and inverted. Then
    the first row has the method "round trip". It is the picture that the source prompt draws from the inverted noise.

    Returns the pictures, uint8 (1 + rows, H, W, 3), with the source first, and one row for each edit. The columns are:

    - model, seed, source_text, target_text, method
    - start: the step at which the method starts; share: the share of the steps for which it works
    - given
    - source_read, read: the texts that OCR reads in the source's picture and in the edited picture
    - f1, cer, exact, target_score, source_score: scores of the read text, see ``metrics``
    - ssim, psnr, mse: similarity to the source's picture, also with ``_outside``, outside the text (PSNR is capped at
      60 dB)
    - row_evaluations, seconds, cache_bytes: the cost of the edit
    - inversion_rows, inversion_seconds: the cost of the inversion

    A ``ScenePair`` adds the columns of its ``about``, and the value that is read for every factor in the edited picture
    (``_read``) and in the source's picture (``_before``). Its mask covers the source's own text.
    """
    run = Experiment.of(subject, **settings)
    noise, cost, drawn = None, {"inversion_rows": 0, "inversion_seconds": 0.0}, []
    if given:
        source = rendered(pair)
        found = invert(run.model, source[None], [pair.source], steps=run.steps)
        noise = found.noise
        cost = {"inversion_rows": found.row_evaluations, "inversion_seconds": found.seconds}
        methods = [Method(name=ROUND_TRIP), *methods]
    else:
        source = run.draw([pair.source], [pair.seed]).images[0]
    for method in methods:
        mine = replace(pair, target=pair.source) if method.name == ROUND_TRIP else pair
        drawn.append(edit(run, mine, method, noise=noise, picture=source, before=False))
    pictures = np.stack([source, *(made.after for made in drawn)])
    source_read, *read = ocr.read(pictures)
    rows = [
        {
            "model": run.name,
            "seed": pair.seed,
            "source_text": pair.source_text,
            "target_text": pair.target_text,
            "method": method.name,
            **dict(zip(("start", "share"), _setting(method), strict=True)),
            "given": given,
            "source_read": source_read,
            "read": text,
            **_text_scores(text, pair),
            "row_evaluations": made.row_evaluations,
            "seconds": made.seconds,
            "cache_bytes": made.cache_bytes,
            **cost,
        }
        for method, made, text in zip(methods, drawn, read, strict=True)
    ]
    if isinstance(pair, ScenePair):
        (kept, *looked), outside = scene_pairs.seen(pictures, pair)
        kept = {name.replace("_read", "_before"): value for name, value in kept.items()}
        rows = [row | pair.about | kept | each for row, each in zip(rows, looked, strict=True)]
    else:
        outside = scene_pairs.outside_text(run.model, pictures, pair)
        outside = outside[1:] if outside.ndim == 3 else outside
    for row, scores in zip(rows, picture_scores(pictures[1:], source, outside), strict=True):
        row |= scores
    return pictures, rows


def _text_scores(read: str, pair: Pair) -> dict[str, float]:
    return {
        "f1": metrics.character_scores(read, pair.target_text)[2],
        "cer": metrics.character_error_rate(read, pair.target_text),
        "exact": metrics.exact_match(read, pair.target_text),
        "target_score": metrics.text_score(read, pair.target_text),
        "source_score": metrics.text_score(read, pair.source_text),
    }


def dials(model: Model, layers: Sequence[int], steps: int | None = None) -> list[Method]:
    """Every method with every setting. Methods without a setting occur once. FlowEdit needs a flow-matching model."""
    steps = model.spec.steps if steps is None else steps
    starts = sorted({round(share * steps) for share in STARTS})
    turned = [localized(layers, start) for start in starts] + [all_layers(model, start) for start in starts]
    turned += [prompt_to_prompt(share) for share in SHARES]
    turned += [prompt_to_prompt_own(share) for share in SHARES if share]
    if isinstance(model.pipe.scheduler, FlowMatchEulerDiscreteScheduler):
        turned += [flow_edit(start) for start in starts]
    return [*turned, same_seed(), plain_target()]


def best(methods: Sequence[Method], table: pd.DataFrame) -> list[Method]:
    """Choose the setting of every method that is reported, from a table of :func:`dials` on pairs for this choice.

    Only settings are considered whose exact rate is at most LOSS below that of the new prompt from the same noise. Of
    these, the setting that keeps most of the picture (SSIM outside the text) is chosen. If there is none, the setting
    with the highest exact rate is chosen.
    """
    means = table.groupby(["method", "start", "share"])[["exact", "ssim_outside"]].mean()
    least = means.exact.xs(SAME_SEED).item() - LOSS
    chosen = []
    for name in dict.fromkeys(method.name for method in methods):
        mine = [method for method in methods if method.name == name]
        found = [tuple(means.loc[(name, *_setting(method))]) for method in mine]
        enough = [(keeps, i) for i, (exact, keeps) in enumerate(found) if exact >= least]
        at = max(enough)[1] if enough else np.argmax([exact for exact, _ in found])
        chosen.append(mine[at])
    return chosen


def _setting(method: Method) -> tuple[int, float]:
    """The columns start and share of a table: the first step, and the share of the steps up to which it works."""
    start = method.patch.start if method.patch is not None else method.flow_from or 0
    return start, 0.0 if method.maps is None else method.maps


def compare(
    experiment: Experiment, pairs: Sequence[Pair], methods: Sequence[Method], *, given: bool = False
) -> pd.DataFrame:
    """The rows of :func:`compare_pair` for all pairs. Each pair is a unit of the store, as in ``sweeps.table``."""

    def compute(pair: Pair) -> list[dict]:
        return compare_pair(experiment, pair, methods, given=given)[1]

    return experiment.units("edit", pairs, _key(methods, given), compute)


def _key(methods: Sequence[Method], given: bool) -> dict:
    about = {"edit_rows": ROWS, "methods": list(methods), "given": given}
    return about | ({"passes": [PASSES, DAMPED]} if given else {})


def _published(
    experiment: Experiment, name: str, methods: Sequence[Method], pairs: Sequence[Pair], *, given: bool = False
) -> pd.DataFrame:
    inputs = _key(methods, given) | {"pairs": digest_of(pairs)}
    made = functools.partial(compare, experiment, pairs, methods, given=given)
    return experiment.table(f"edit_{experiment.name}_{name}", inputs, made)


#: The tables by name: the template of the prompts (None: they name everything), and whether pictures are given.
TABLES = {"open": (world.OPEN, False), "named": (None, False), "open_given": (world.OPEN, True)}


def pairs_of(work: Preset) -> dict[str, int]:
    """The number of pairs of each of TABLES at a preset. Given pictures are inverted first, which takes a long time."""
    return {"open": work.words, "named": work.edits, "open_given": work.pairs}


def table(
    experiment: Experiment, name: str, layers: Sequence[int], n: int, seed: int = 42, *, noises: int = 1
) -> pd.DataFrame:
    """One of TABLES: every method with its best setting, on ``n`` pairs of test words, each from several ``noises``.

    The two words of a pair belong to different materials. So a new prompt that names only the text asks for another
    material without naming it. Settings are chosen by :func:`best` from :func:`dial_table`. The table is published as
    ``results/edit_MODEL_NAME.csv``. Raises TextlocError for an unknown table or for layers out of range.
    """
    known = dial_table(experiment, layers, n, seed, name=name)
    turned = dials(experiment.model, sorted(as_indices(layers, "layers")), experiment.steps)
    chosen = best(turned, known)
    template, given = TABLES[name]
    if given:
        # A given picture has only one noise, so there is no plain target from another noise.
        chosen = [method for method in chosen if method.name != PLAIN]
    pairs = _pairs(experiment.model, n, "report", seed, template)
    return _published(experiment, name, chosen, with_noises(pairs, noises), given=given)


def dial_table(
    experiment: Experiment, layers: Sequence[int], n: int, seed: int = 42, *, name: str = "open"
) -> pd.DataFrame:
    """Every method with every setting, on TUNING pairs of validation words (or on ``n``, if ``n`` is smaller).

    The pictures are drawn, not given. The table is published as ``results/edit_MODEL_dials.csv`` or
    ``results/edit_MODEL_named_dials.csv``. Raises TextlocError for an unknown table or for layers out of range.
    """
    if name not in TABLES:
        raise TextlocError(f"unknown table {name!r}; allowed: {', '.join(TABLES)}")
    layers = tuple(sorted(as_indices(layers, "layers")))
    if not layers:
        raise TextlocError("localized editing needs at least one layer")
    check_layers(experiment.model, layers)
    template = TABLES[name][0]
    pairs = _pairs(experiment.model, min(TUNING, n), "tune", seed, template)
    turned = dials(experiment.model, layers, experiment.steps)
    return _published(experiment, "dials" if template else "named_dials", turned, pairs)


def _pairs(model: Model, n: int, use: str, seed: int, template: str | None) -> list[Pair]:
    return scene_pairs.for_model(model, n, use, seed, template=template, two_groups=True)


def chosen(model: Model, layers: Sequence[int], table: pd.DataFrame, steps: int | None = None) -> list[Method]:
    """The methods of a :func:`table`, with its settings."""
    known = set(table[["method", "start", "share"]].itertuples(index=False, name=None))
    return [method for method in dials(model, layers, steps) if (method.name, *_setting(method)) in known]


def settings_told(table: pd.DataFrame) -> pd.Series:
    """The setting of each method of a :func:`table` in words. It is empty for a method without a setting."""
    told = {
        row.method: f"up to {row.share:g} of the steps" if row.method in (P2P, P2P_OWN) else f"from step {row.start}"
        for row in table.drop_duplicates("method").itertuples()
    }
    return pd.Series(told | dict.fromkeys({SAME_SEED, PLAIN, ROUND_TRIP} & told.keys(), ""))


def kept(table: pd.DataFrame) -> pd.DataFrame:
    """How often each method keeps each factor of the source's picture, from a :func:`table` of a miniature.

    There is one row per method. Columns: method, start, share, n, and the rates of every factor and of exact, each with
    ``_low`` and ``_high`` (Wilson's interval). For other models the table has no factors, because they are not read.
    """
    read = [name for name in scene_pairs.FACTORS if f"{name}_read" in table]
    columns = {name: table[f"{name}_read"] == table[f"{name}_before"] for name in read}
    return metrics.summarise(table.assign(**columns), ["method", "start", "share"], [*columns, "exact"])


SCORES = ("f1", "cer", "exact", "ssim", "psnr", "mse", "ssim_outside", "psnr_outside", "mse_outside")


def summarise(table: pd.DataFrame, scores: Sequence[str] = SCORES) -> pd.DataFrame:
    """Mean and 95 % interval of each score per method and setting, in the table's order.

    Columns: method, start, share, n, the mean of each score under its name and its interval (``_low`` and ``_high``),
    the means of row_evaluations and seconds, and the largest cache_bytes.
    """
    by = ["method", "start", "share"]
    costs = table.groupby(by).agg({"row_evaluations": "mean", "seconds": "mean", "cache_bytes": "max"})
    return metrics.summarise(table, by, scores).join(costs, on=by)


def differences(table: pd.DataFrame, scores: Sequence[str] = SCORES) -> pd.DataFrame:
    """Localized editing minus each other method, paired. Columns: method, score, mean, low, high, n."""
    rows = []
    by_pair = {score: table.pivot(index="seed", columns="method", values=score).astype(float) for score in scores}
    for method in dict.fromkeys(table.method):
        if method not in (LOCALIZED, ROUND_TRIP):
            for score, values in by_pair.items():
                interval = metrics.paired_difference(values[LOCALIZED], values[method])
                rows.append({"method": method, "score": score, **asdict(interval)})
    return pd.DataFrame(rows)
