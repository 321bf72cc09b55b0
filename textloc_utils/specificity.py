"""Whether the layers that hold the text are the text's alone: every factor of a scene is localized by the same rule.

For each factor, pairs of validation words that differ in it alone select a set of layers (``localization``, by exact
match). Pairs of test words then say what the set brings, what all other layers bring, and what random sets of the same
size bring. Another table patches the text's layers from targets that differ in the text and in one more factor; and a
last one empties them, to see whether the text is written without them.
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
#: A factor is localized only where all layers together bring it in at least this share of the pairs: a share of a rarer
#: effect rests on too few pairs.
BROUGHT = 0.5
#: Added to the seed of the pairs of the budgeted search: other pairs than the exhaustive one's.
OTHER_PAIRS = 500


def search(experiment: Experiment, factor: str, n: int, seed: int = 42) -> localization.Found | None:
    """The set of layers that holds one of SEARCHED, from ``n`` pairs; None where there is nothing to localize.

    That is where all layers together bring the factor too rarely, see :func:`brought`. Published as
    ``localization.localize`` says.
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
    """The set that holds the text by every search of ``localization.SEARCHES``, from ``n`` pairs that select.

    The budgeted search has pairs of its own, so that it cannot agree with the exhaustive one by their chance alone.
    Published as ``localization.localize`` says.
    """
    found = {}
    for how in localization.SEARCHES:
        own = seed + OTHER_PAIRS if how == "budgeted" else seed
        pairs = scene_pairs.for_model(experiment.model, n, "select", own)
        found[how] = localization.published(experiment, pairs, how, by="exact")[0]
    return found


def found_sets(experiment: Experiment, n: int, seed: int = 42) -> dict[str, tuple[int, ...]]:
    """The layers of every factor of SEARCHED that :func:`search` finds, from ``n`` pairs each; not of the text."""
    found = {factor: search(experiment, factor, n, seed) for factor in FACTORS}
    return {factor: held.layers for factor, held in found.items() if held is not None}


def alone(experiment: Experiment, n: int, seed: int = 42) -> pd.DataFrame:
    """How often each layer alone, all together, and the pooled text bring each of SEARCHED, on ``n`` pairs that select.

    Columns differs, kind ("layer", "all", and "pooled" and "all + pooled" of a model with a pooled text), layers, n,
    exact, exact_low, exact_high (Wilson's interval). Published as ``results/study_MODEL_alone.csv``, also for a factor
    that no search found.
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
    """RANDOM_SETS different sets of as many other layers as ``layers``, of kind "random"; fewer where there are not."""
    others, size = len(model.layers) - len(layers), len(layers)
    many = min(RANDOM_SETS, math.comb(others if others >= size else len(model.layers), size))
    sets: dict[tuple[int, ...], None] = {}
    draw = 0
    while len(sets) < many:
        sets[random_layers(model, layers, f"{seed} {draw}")] = None
        draw += 1
    return [Site(kind="random", layers=each) for each in sets]


def reported(experiment: Experiment, sets: Mapping[str, tuple[int, ...]], n: int, seed: int = 42) -> pd.DataFrame:
    """What the set of each factor brings on ``n`` pairs of test words that differ in that factor alone.

    ``sets`` has the layers of every factor that :func:`search` found, the text among them. One row per pair and picture
    (``sweeps.patch_pair``); kinds of sites: "found", "all", "others" (all layers but the found), "text set" (for the
    other factors) and "random" (for the text). Published as ``results/study_MODEL_specific.csv``.
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
    """What else the text's ``layers`` move, over ``n`` pairs of test words for every factor.

    The targets differ in the text and in that factor. Rows as of :func:`reported`; kinds of sites: "found", "all".
    Published as ``results/study_MODEL_carried.csv``.
    """
    sites = [Site(kind="found", layers=layers), every_layer(experiment.model)]
    plans = [(scene_pairs.make(n, "report", seed, differs=("text", factor)), sites) for factor in FACTORS]
    return _table(experiment, "carried", plans)


def needed(experiment: Experiment, layers: tuple[int, ...], n: int, seed: int = 42) -> pd.DataFrame:
    """Whether ``n`` test words are still written when layers read an empty prompt in place of theirs.

    ``exact`` says that the word is written. Rows as of ``sweeps.patch_pair``; kinds of sites: "found", "others", "all"
    and "random". Published as ``results/study_MODEL_needed.csv``.
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

    Columns differs (where the table has it), kind ("source" is the unpatched picture), layers, n, exact, exact_low,
    exact_high: Wilson's interval, and of random sets, which are taken together, Student's over the sets.
    """
    by = [column for column in ("differs", "kind", "layers") if column in table]
    drawn = table[table.kind == "random"]
    sets = metrics.summarise_groups(drawn.assign(layers="random", set=drawn.layers), by, "set", ["exact"])
    return pd.concat([metrics.summarise(table[table.kind != "random"], by, ["exact"]), sets], ignore_index=True)


def by_style(table: pd.DataFrame) -> pd.DataFrame:
    """How often the text's set, and all layers, write the target in each typeface that the prompts name.

    From the table of :func:`reported`; columns typeface, kind ("found", "all"), n, exact, exact_low, exact_high.
    """
    part = table[(table.differs == "text") & table.kind.isin(["found", "all"])]
    part = part.rename(columns={"source_typeface": "typeface"})
    return metrics.summarise(part, ["typeface", "kind"], ["exact"])


def moved(table: pd.DataFrame) -> pd.DataFrame:
    """How often each site turns a factor into the target's, from the table of :func:`carried`, with Wilson's intervals.

    Columns factor, kind ("source" is the unpatched picture), layers, n, moved, moved_low, moved_high, and of the text
    exact, exact_low, exact_high.
    """
    factor = table.differs.str.removeprefix("text ")
    values = [
        row[f"{name}_read"] == row[f"target_{name}"] for name, (_, row) in zip(factor, table.iterrows(), strict=True)
    ]
    return metrics.summarise(
        table.assign(factor=factor, moved=values), ["factor", "kind", "layers"], ["moved", "exact"]
    )
