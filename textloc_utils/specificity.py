"""Whether the layers that hold the text are the text's alone: every factor of a scene is localized by the same rule.

For each factor, pairs of validation words that differ in it alone select a set of layers (``localization``, by exact
match). Pairs of test words then say what the set brings, what all other layers bring, and what random sets of the same
size bring. A last table patches the text's layers from targets that differ in the text and in one more factor.
"""

import random
from collections.abc import Mapping

import pandas as pd

from textloc_utils import localization, metrics, scene_pairs, sweeps
from textloc_utils.experiment import Experiment, digest_of
from textloc_utils.models import Model
from textloc_utils.scene_pairs import FACTORS
from textloc_utils.sites import Site, every_layer

SEARCHED = ("text", *FACTORS)
RANDOM_SETS = 5


def search(experiment: Experiment, factor: str, n: int, seed: int = 42) -> localization.Found | None:
    """The set of layers that holds one of SEARCHED, from ``n`` pairs; None where all layers together bring nothing.

    Published as ``localization.localize`` says.
    """
    pairs = scene_pairs.make(n, "select", seed, differs=(factor,))
    try:
        return localization.published(experiment, pairs, "exhaustive", by="exact")[0]
    except localization.NothingFoundError:
        return None


def random_sets(model: Model, size: int, seed: int = 0) -> list[Site]:
    """RANDOM_SETS sites of ``size`` text layers, of kind "random"."""
    rng, every = random.Random(f"random sets {seed}"), range(len(model.layers))
    return [Site(kind="random", layers=tuple(sorted(rng.sample(every, size)))) for _ in range(RANDOM_SETS)]


def reported(experiment: Experiment, sets: Mapping[str, tuple[int, ...]], n: int, seed: int = 42) -> pd.DataFrame:
    """What the set of each factor brings on ``n`` pairs of test words that differ in that factor alone.

    ``sets`` has the layers of every factor that :func:`search` found, the text among them. One row per pair and picture
    (``sweeps.patch_pair``); kinds of sites: "found", "all", "others" (all layers but the found), "text set" (for the
    other factors) and "random" (for the text). Published as ``results/study_MODEL_specific.csv``.
    """
    model, every = experiment.model, every_layer(experiment.model)
    plans = []
    for factor, layers in sets.items():
        others = tuple(i for i in every.layers if i not in layers)
        sites = [Site(kind="found", layers=layers), every, Site(kind="others", layers=others)]
        if factor == "text":
            sites += random_sets(model, len(layers), seed)
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


def _table(experiment: Experiment, name: str, plans: list) -> pd.DataFrame:
    inputs = {"rows": sweeps.ROWS, "plans": [[digest_of(pairs), sites] for pairs, sites in plans]}
    return experiment.table(
        f"study_{experiment.name}_{name}",
        inputs,
        lambda: pd.concat([sweeps.table(experiment, *plan) for plan in plans], ignore_index=True),
    )


# --- short tables ---------------------------------------------------------------------------------------------


def rates(table: pd.DataFrame) -> pd.DataFrame:
    """How often each site draws the whole target, from the table of :func:`reported`, with Wilson's intervals.

    Columns differs, kind, layers, n, exact, exact_low, exact_high; random sets are taken together.
    """
    patched = table[~table.kind.isin(["source"])]
    patched = patched.assign(layers=patched.layers.where(patched.kind != "random", "random"))
    return metrics.summarise(patched, ["differs", "kind", "layers"], ["exact"])


def moved(table: pd.DataFrame) -> pd.DataFrame:
    """How often each site turns a factor into the target's, from the table of :func:`carried`, with Wilson's intervals.

    Columns factor, kind, layers, n, moved, moved_low, moved_high, and of the text exact, exact_low, exact_high.
    """
    patched = table[~table.kind.isin(["source"])]
    factor = patched.differs.str.removeprefix("text ")
    values = [
        row[f"{name}_read"] == row[f"target_{name}"] for name, (_, row) in zip(factor, patched.iterrows(), strict=True)
    ]
    return metrics.summarise(
        patched.assign(factor=factor, moved=values), ["factor", "kind", "layers"], ["moved", "exact"]
    )
