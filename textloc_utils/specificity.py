"""Test whether the layers that hold the text hold only the text: every factor of a scene is localized by the same rule.

For each factor, a set of layers is selected on pairs of validation words that differ only in this factor
(``localization``, by exact match). Pairs of test words then measure how often the factor changes if this set, all other
layers, or random sets of the same size are patched. In another table, the text's layers are patched from targets that
differ in the text and in one more factor. In the last table, layers read an empty prompt, to see whether the text is
written without them.
"""

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from textloc_utils import localization, metrics, scene_pairs, sweeps
from textloc_utils.experiment import Experiment, digest_of
from textloc_utils.models import Model
from textloc_utils.prompts import Pair
from textloc_utils.scene_pairs import FACTORS
from textloc_utils.sites import Site, every_layer, random_layers

SEARCHED = ("text", *FACTORS)
RANDOM_SETS = 5
#: A factor is localized only if all layers together bring it in at least this share of the pairs. A share of a rarer
#: effect would rest on too few pairs.
BROUGHT = 0.5
#: Added to the seed of the budgeted search's pairs, so they differ from those of the exhaustive search.
OTHER_PAIRS = 500


def search(experiment: Experiment, factor: str, n: int, seed: int = 42) -> localization.Found | None:
    """The set of layers that holds one of SEARCHED, from ``n`` pairs. None if there is nothing to localize.

    This is so if all layers together bring the factor too rarely, see :func:`brought`. The result is published as
    described in ``localization.localize``.
    """
    pairs = scene_pairs.make(n, "select", seed, differs=(factor,))
    try:
        found, table = localization.published(experiment, pairs, "exhaustive", by="exact")
    except localization.NothingFoundError:
        return None
    return found if brought(table) else None


def brought(sweep: pd.DataFrame) -> bool:
    """Whether all layers together bring the target's value in at least the share BROUGHT of a sweep's pairs."""
    return bool(sweep.exact[sweep.kind == "all"].mean() >= BROUGHT)


def searches(experiment: Experiment, n: int, seed: int = 42) -> dict[str, localization.Found]:
    """The set that holds the text, from every search of ``localization.SEARCHES`` on ``n`` pairs for selection.

    The budgeted search uses other pairs. So it cannot agree with the exhaustive search only because of the same pairs.
    The outcomes are published as described in ``localization.localize``.
    """
    found = {}
    for how in localization.SEARCHES:
        own = seed + OTHER_PAIRS if how == "budgeted" else seed
        pairs = scene_pairs.for_model(experiment.model, n, "select", own)
        found[how] = localization.published(experiment, pairs, how, by="exact")[0]
    return found


def found_sets(experiment: Experiment, n: int, seed: int = 42) -> dict[str, tuple[int, ...]]:
    """The layers of every factor of FACTORS for which :func:`search` finds any, from ``n`` pairs each."""
    found = {factor: search(experiment, factor, n, seed) for factor in FACTORS}
    return {factor: held.layers for factor, held in found.items() if held is not None}


def alone(experiment: Experiment, n: int, seed: int = 42) -> pd.DataFrame:
    """How often each layer alone, all layers, and the pooled text bring each of SEARCHED, on ``n`` pairs for selection.

    Columns: differs, kind ("layer", "all", and "pooled" and "all + pooled" of a model with a pooled text), layers, n,
    exact, exact_low, exact_high (Wilson's interval). The table is published as ``results/study_MODEL_alone.csv``, also
    with factors for which the search finds no layers.
    """
    pairs = {factor: scene_pairs.make(n, "select", seed, differs=(factor,)) for factor in SEARCHED}

    def make() -> pd.DataFrame:
        swept = pd.concat([sweeps.table(experiment, each) for each in pairs.values()], ignore_index=True)
        kinds = ["layer", "all", "pooled", "all + pooled"]
        return metrics.summarise(swept[swept.kind.isin(kinds)], ["differs", "kind", "layers"], ["exact"])

    inputs = {"rows": sweeps.ROWS, "pairs": {factor: digest_of(each) for factor, each in pairs.items()}}
    return experiment.table(f"study_{experiment.name}_alone", inputs, make)


def _set_and_others(model: Model, layers: tuple[int, ...]) -> list[Site]:
    every = every_layer(model)
    others = tuple(layer for layer in every.layers if layer not in layers)
    return [Site(kind="found", layers=layers), every, Site(kind="others", layers=others)]


def random_sets(model: Model, layers: Sequence[int], seed: int = 0) -> list[Site]:
    """RANDOM_SETS different sets of kind "random" with as many other layers as ``layers`` (fewer if not possible)."""
    others, size = len(model.layers) - len(layers), len(layers)
    many = min(RANDOM_SETS, math.comb(others if others >= size else len(model.layers), size))
    sets: dict[tuple[int, ...], None] = {}
    draw = 0
    while len(sets) < many:
        sets[random_layers(model, layers, f"{seed} {draw}")] = None
        draw += 1
    return [Site(kind="random", layers=each) for each in sets]


def reported(experiment: Experiment, sets: Mapping[str, tuple[int, ...]], n: int, seed: int = 42) -> pd.DataFrame:
    """Measure the effect of each factor's set on ``n`` pairs of test words that differ only in that factor.

    ``sets`` has the layers of every factor for which :func:`search` found any, including the text. The table has one
    row per pair and picture (``sweeps.patch_pair``). The kinds of sites are "found", "all", "others" (all layers except
    the found ones), "text set" (for the other factors) and "random" (for the text). It is published as
    ``results/study_MODEL_specific.csv``.
    """
    model, plans = experiment.model, []
    for factor, layers in sets.items():
        sites = _set_and_others(model, layers)
        if factor == "text":
            sites += random_sets(model, layers, seed)
        else:
            sites.append(Site(kind="text set", layers=sets["text"]))
        sites = [site for site in dict.fromkeys(sites) if site.layers]
        plans.append((scene_pairs.make(n, "report", seed, differs=(factor,)), sites))
    return _table(experiment, "specific", plans)


def carried(experiment: Experiment, layers: tuple[int, ...], n: int, seed: int = 42) -> pd.DataFrame:
    """Measure which other factors the text's ``layers`` change, on ``n`` pairs of test words for every factor.

    The targets differ in the text and in that factor. The rows are as in :func:`reported`. The kinds of sites are
    "found" and "all". The table is published as ``results/study_MODEL_carried.csv``.
    """
    sites = [Site(kind="found", layers=layers), every_layer(experiment.model)]
    plans = [(scene_pairs.make(n, "report", seed, differs=("text", factor)), sites) for factor in FACTORS]
    return _table(experiment, "carried", plans)


def needed(experiment: Experiment, layers: tuple[int, ...], n: int, seed: int = 42) -> pd.DataFrame:
    """Measure whether ``n`` test words are still written if layers read an empty prompt instead of their prompt.

    ``exact`` says whether the word is written. The rows are as in ``sweeps.patch_pair``. The kinds of sites are
    "found", "others", "all" and "random". The table is published as ``results/study_MODEL_needed.csv``.
    """
    model = experiment.model
    sites = [*_set_and_others(model, layers), *random_sets(model, layers, seed)]
    sites = [site for site in sites if site.layers]
    emptied = [
        Pair(source=p.source, target="", source_text=p.source_text, target_text=p.source_text, seed=p.seed)
        for p in scene_pairs.for_model(model, n, "report", seed)
    ]
    return _table(experiment, "needed", [(emptied, list(dict.fromkeys(sites)))])


def _table(experiment: Experiment, name: str, plans: list) -> pd.DataFrame:
    inputs = {"rows": sweeps.ROWS, "plans": [[digest_of(pairs), sites] for pairs, sites in plans]}
    return experiment.table(
        f"study_{experiment.name}_{name}",
        inputs,
        lambda: pd.concat([sweeps.table(experiment, *plan) for plan in plans], ignore_index=True),
    )


# --- short tables ---------------------------------------------------------------------------------------------


def rates(table: pd.DataFrame) -> pd.DataFrame:
    """How often each site draws the whole target, from the table of :func:`reported` or :func:`needed`.

    Columns: differs (if the table has it), kind ("source" is the unpatched picture), layers, n, exact, exact_low,
    exact_high. The interval is Wilson's. Random sets are combined in one row. Its interval is Student's over the sets.
    """
    by = [column for column in ("differs", "kind", "layers") if column in table]
    drawn = table[table.kind == "random"]
    sets = metrics.summarise_groups(drawn.assign(layers="random", set=drawn.layers), by, "set", ["exact"])
    return pd.concat([metrics.summarise(table[table.kind != "random"], by, ["exact"]), sets], ignore_index=True)


def by_style(table: pd.DataFrame) -> pd.DataFrame:
    """How often the text's set, and all layers, write the target in each typeface that the prompts name.

    The input is the table of :func:`reported`. Columns: typeface, kind ("found", "all"), n, exact, exact_low,
    exact_high.
    """
    part = table[(table.differs == "text") & table.kind.isin(["found", "all"])]
    part = part.rename(columns={"source_typeface": "typeface"})
    return metrics.summarise(part, ["typeface", "kind"], ["exact"])


def moved(table: pd.DataFrame) -> pd.DataFrame:
    """How often each site changes a factor to the target's value, from the table of :func:`carried`.

    Columns: factor, kind ("source" is the unpatched picture), layers, n, moved, moved_low, moved_high, and for the text
    exact, exact_low, exact_high. The intervals are Wilson's.
    """
    factor = table.differs.str.removeprefix("text ")
    values = [
        row[f"{name}_read"] == row[f"target_{name}"] for name, (_, row) in zip(factor, table.iterrows(), strict=True)
    ]
    return metrics.summarise(
        table.assign(factor=factor, moved=values), ["factor", "kind", "layers"], ["moved", "exact"]
    )
