"""Studies of what the layers carry: steps, tokens, heads, keys and values, pooled text, word length.

Each study patches its own sites in its own pairs (``sweeps.table``). The functions of this module summarise the tables
of the studies. The published table of a study is used if its weights, pairs, sites and settings are the same.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from textloc_utils import metrics, scene_pairs, sweeps
from textloc_utils.experiment import Experiment, digest_of
from textloc_utils.models import Model, as_indices, check_layers
from textloc_utils.prompts import Pair
from textloc_utils.settings import TextlocError
from textloc_utils.sites import Site, every_layer, token_groups

SHARE = 0.9  #: share of the exact rate of all heads that the fewest heads must reach
RANDOM_HEADS = 3
WINDOW = (0.0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8)  #: shares of the steps at which a patch starts or stops


def _base(model: Model, layers: tuple[int, ...]) -> list[Site]:
    """The sites of the localized set (kind "found") and of all layers."""
    return [Site(kind="found", layers=layers), every_layer(model)]


def _steps(model: Model, layers: tuple[int, ...], steps: int) -> list[Site]:
    """The sites of the set, patched from a step on or until a step."""
    at = sorted({round(share * steps) for share in WINDOW} - {0})
    sites = _base(model, layers) + [Site(kind="from step", layers=layers, start=k) for k in at]
    return sites + [Site(kind="until step", layers=layers, stop=k) for k in at]


def _parts(model: Model, layers: tuple[int, ...], steps: int) -> list[Site]:
    """The sites of the set's keys, of its values, of each of its heads, and of the pooled text."""
    sites = _base(model, layers)
    sites += [Site(kind="keys", layers=layers, tensors="k"), Site(kind="values", layers=layers, tensors="v")]
    heads = range(min(model.layers[i].heads for i in layers))
    sites += [Site(kind="head", layers=layers, heads=(head,)) for head in heads]
    if model.pooled_site is not None:
        sites += [Site(kind="pooled", pooled=True), Site(kind="found + pooled", layers=layers, pooled=True)]
    return sites


def _tokens(model: Model, layers: tuple[int, ...], steps: int) -> list[Site]:
    """The sites of the set at the tokens in which the prompts differ (also for each text alone), and at the others."""
    groups = token_groups(model, Pair.of('A sign that says "HELLO".', "WORLD"))
    return _base(model, layers) + [Site(kind=f"{name} tokens", layers=layers, tokens=name) for name in groups]


def _pairs(model: Model, n: int, seed: int) -> list[Pair]:
    return scene_pairs.for_model(model, n, "report", seed)


def _equally_long(model: Model, n: int, seed: int) -> list[Pair]:
    """Pairs whose prompts have their tokens at the same positions."""
    if scene_pairs.world_of(model) is not None:
        return scene_pairs.for_model(model, n, "report", seed, same_length=True)
    pairs = scene_pairs.for_model(model, 8 * n, "report", seed)
    return [pair for pair in pairs if len(pair.source_text) == len(pair.target_text)][:n]


@dataclass(frozen=True, kw_only=True)
class Study:
    """The functions that give the sites of a study (from model, layers, steps) and its pairs (from model, n, seed)."""

    sites: Callable[[Model, tuple[int, ...], int], list[Site]]
    pairs: Callable[[Model, int, int], list[Pair]] = _pairs


STUDIES = {
    "steps": Study(sites=_steps),
    "parts": Study(sites=_parts),
    "length": Study(sites=lambda model, layers, steps: _base(model, layers)),
    "tokens": Study(sites=_tokens, pairs=_equally_long),
}


def study(experiment: Experiment, name: str, layers: Sequence[int], n: int, seed: int = 42) -> pd.DataFrame:
    """The sweep's table (``sweeps.patch_pair``) of one of STUDIES for the localized ``layers`` over ``n`` pairs.

    It is published as ``results/study_MODEL_NAME.csv``, see ``experiment.Experiment.table``. Raises TextlocError for an
    unknown study or for layers out of range.
    """
    if name not in STUDIES:
        raise TextlocError(f"unknown study {name!r}; allowed: {', '.join(STUDIES)}")
    layers = tuple(sorted(as_indices(layers, "layers")))
    if not layers:
        raise TextlocError("a study needs at least one localized layer")
    check_layers(experiment.model, layers)
    sites = STUDIES[name].sites(experiment.model, layers, experiment.steps)
    pairs = STUDIES[name].pairs(experiment.model, n, seed)
    inputs = {"rows": sweeps.ROWS, "pairs": digest_of(pairs), "sites": sites}
    return experiment.table(f"study_{experiment.name}_{name}", inputs, lambda: sweeps.table(experiment, pairs, sites))


def heads(experiment: Experiment, layers: Sequence[int], n: int, seed: int = 42) -> pd.DataFrame:
    """Find the fewest heads of the localized ``layers`` that write the text, and compare them with the other heads.

    On ``n`` pairs for selection, every head is left out alone. Then heads are removed, first those whose absence
    matters least. A head is removed only if the remaining heads still draw the whole target at least SHARE times as
    often as all heads. The table has rows as in ``sweeps.patch_pair`` for ``n`` other pairs, which are reported. The
    kinds of sites are "found", "fewest heads", "other heads" and "random heads" (RANDOM_HEADS random sets, each with
    as many heads as the fewest heads). It is published as ``results/study_MODEL_heads.csv``.
    """
    model, layers = experiment.model, tuple(sorted(as_indices(layers, "layers")))
    check_layers(model, layers)
    chosen_on, reported = (scene_pairs.for_model(model, n, use, seed) for use in ("select", "report"))
    every = tuple((layer, head) for layer in layers for head in range(model.layers[layer].heads))

    def of(chosen: Sequence[tuple[int, int]], kind: str = "heads") -> Site:
        # A layer is not patched if none of its heads is chosen.
        return Site(kind=kind, layers=tuple(sorted({layer for layer, _ in chosen})), layer_heads=tuple(sorted(chosen)))

    def exact(sites: Sequence[Site]) -> list[float]:
        table = sweeps.table(experiment, chosen_on, sites, source=False)
        rates = table[table.kind != "target"].groupby(["layers", "heads"]).exact.mean()
        return [rates[tuple(site.columns(experiment.steps)[name] for name in ("layers", "heads"))] for site in sites]

    def make() -> pd.DataFrame:
        alone = [of([other for other in every if other != head]) for head in every]
        whole, *without = exact([of(every), *(site for site in alone if site.layers)])
        kept = list(every)
        for _, head in sorted(zip(without, every, strict=False), reverse=True):
            fewer = [other for other in kept if other != head]
            if fewer and exact([of(fewer)])[0] >= SHARE * whole:
                kept = fewer
        others = [head for head in every if head not in kept]
        rng = random.Random(f"random heads {seed}")
        sites = [Site(kind="found", layers=layers), of(kept, "fewest heads"), of(others, "other heads")]
        sites += [of(rng.sample(every, len(kept)), "random heads") for _ in range(RANDOM_HEADS)]
        return sweeps.table(experiment, reported, [site for site in dict.fromkeys(sites) if site.layers])

    inputs = {"rows": sweeps.ROWS, "layers": layers, "pairs": [digest_of(chosen_on), digest_of(reported)]}
    return experiment.table(f"study_{experiment.name}_heads", inputs, make)


# --- short tables ---------------------------------------------------------------------------------------------


def rates(table: pd.DataFrame) -> pd.DataFrame:
    """How often each kind of site draws the whole target, from a table of :func:`study` or :func:`heads`.

    Columns: kind, heads (if the kind has heads), tensors, n, exact, exact_low, exact_high (Wilson's interval).
    """
    patched = table[~table.kind.isin(["source", "target"])]
    patched = patched.assign(heads=patched.heads.where(patched.kind != "random heads", ""))
    return metrics.summarise(patched, ["kind", "heads", "tensors"], ["exact"])


def windows(table: pd.DataFrame) -> pd.DataFrame:
    """Summarise the table of the study "steps". Columns: kind ("from step", "until step"), step, mean, low, high, n.

    Effects are shares of the found set's mean effect when it is patched at all steps.
    """
    effects = sweeps.effect_intervals(table)
    whole = effects["mean"][effects.kind == "found"].item()
    parts = effects[effects.kind.isin(["from step", "until step"])].reset_index(drop=True)
    step = parts.start.where(parts.kind == "from step", parts.stop)
    return parts[["kind"]].assign(step=step, **parts[["mean", "low", "high"]] / whole, n=parts.n)


def by_length(table: pd.DataFrame) -> pd.DataFrame:
    """How often the whole target is written if it is shorter, as long, or longer than the source.

    The input is the table of the study "length". Columns: target ("shorter", "as long", "longer"), kind ("source",
    "found", "all"), n, exact, exact_low, exact_high (Wilson's interval).
    """
    longer = np.sign(table.target_text.str.len() - table.source_text.str.len())
    named = longer.map({-1: "shorter", 0: "as long", 1: "longer"})
    part = table.assign(target=named)[table.kind.isin(["source", "found", "all"])]
    return metrics.summarise(part.sort_values("target", kind="stable"), ["target", "kind"], ["exact"])
