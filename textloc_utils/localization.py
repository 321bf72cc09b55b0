"""Find the smallest set of layers that controls the drawn text, with a full sweep or at a fraction of its cost.

A set of layers **reaches** the share r of the all-layer patch's effect if its mean text effect (``sweeps``) over the
pairs is r times the mean text effect of the all-layer patch.

**Selection rule.** Layers are sorted by how much each layer alone changes the text. This is the sum of its effect and
of the source score that it removes, because a layer may erase the source's text and need other layers to write the
target's. Layers are added in this order until the set reaches ``share`` (0.9). Then each layer of the set is tested,
the weakest first. It is left out if the other layers still reach ``share``.

With ``by="exact"`` a set's effect is the share of pairs in which the whole target is drawn. If the pairs differ in a
factor other than the text (``scene_pairs``), the same search finds the layers that hold that factor.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from diffusers import DiffusionPipeline
from scipy import stats

from textloc_utils import metrics, onestep, sweeps
from textloc_utils.experiment import Experiment, Spent, check_pairs, digest_of, published_store
from textloc_utils.generate import rows_per_call
from textloc_utils.models import Model, check_distinct, key_value_numbers
from textloc_utils.prompts import Pair
from textloc_utils.settings import TextlocError
from textloc_utils.sites import Site, every_layer, joined, single_layers, together

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARE = 0.9  #: share of the all-layer patch's text effect that a set must reach
BUDGET = 0.1  #: budget of a search, as a share of the exhaustive sweep's cost
WITHOUT_PICTURES = (*onestep.DEPTHS, onestep.ATTENTION)
SEARCHES = ("exhaustive", "budgeted", *WITHOUT_PICTURES)
EFFECTS = ("score", "exact")  #: definitions of a set's effect, see :func:`sweeps.set_effects`
#: Settings of the budgeted search: the number of pairs that are screened, the share of the screened effects that the
#: first leading sets hold, the number of pairs of the first round, and its growth factor from round to round.
SCREEN, SCREENED, FIRST, GROWTH = 6, 0.98, 8, 1.5
ERROR = 0.05  #: chance that any decision of a search is wrong, over all its races, sets and interim tests


class NothingFoundError(TextlocError):
    """Patching all layers together draws nothing of the target, so no set can be chosen."""


# --- what is found --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, repr=False)
class Found:
    """What a search found.

    ``layers`` is the set. ``effects`` holds the mean effect of each layer alone (text effects, or one-step effects).
    ``score`` is the set's mean target score (None if no pictures were drawn). ``reached`` is the share of the all-layer
    patch's effect. ``confidence`` is the share of bootstrap resamples of the pairs in which this set is chosen among
    the compared sets (each set counts on the pairs on which it was drawn). ``sure`` says whether a budgeted search
    decided on every set before its budget ended (None after any other search). ``share`` is the set's share of the
    denoiser's parameters (key and value maps). ``row_evaluations`` is the cost, including units that were already
    stored. ``seconds`` is the wall time of this run.
    """

    model: str
    search: str
    layers: tuple[int, ...]
    effects: tuple[float, ...]
    score: metrics.Interval | None
    reached: metrics.Interval
    confidence: float
    share: float
    pairs: int
    row_evaluations: int
    seconds: float
    sure: bool | None = None

    def __repr__(self) -> str:
        told = [
            f"{self.model}: layers {joined(self.layers)} of {len(self.effects)}, {self.share:.2%} of the parameters"
        ]
        told += [f"target text score {self.score}"] if self.score is not None else []
        told += [f"share of the effect of all layers {self.reached}; confidence {self.confidence:.2f}"]
        told += ["the budget ended before the search was sure about every set"] if self.sure is False else []
        told += [f"{self.row_evaluations:,} denoiser row evaluations, {self.seconds:.0f} s"]
        return "\n".join(told)

    def show(self) -> "Figure":
        """Draw the effect of each layer alone as bars. The layers of the set are marked."""
        from textloc_utils.book import plots

        ends = dict.fromkeys(("mean", "low", "high"), self.effects)
        table = pd.DataFrame({"layer": range(len(self.effects)), **ends})
        return plots.effects_by_model({self.model: table}, {self.model: self.layers})


def reached(effects: pd.DataFrame, layers: Sequence[int]) -> np.ndarray:
    """Share of the all-layer patch's effect that a set reaches: first the estimate, then its bootstrap values.

    ``effects`` is a table of ``sweeps.set_effects``. Whole pairs are resampled, and the same pairs are used for every
    set of a table. A pair counts if the set was drawn on it. Raises NothingFoundError if the patch of all layers has no
    effect.
    """
    both = effects[[joined(layers), "all"]].to_numpy()
    both = np.where(np.isnan(both).any(1, keepdims=True), 0.0, both)
    if both[:, 1].sum() <= 0:
        raise NothingFoundError(
            "patching all layers draws nothing of the target: there is nothing to localize in this model"
        )
    # Pairs without a value count as 0 in both columns, so the ratio of the two means does not change.
    own, every = np.concatenate([both.mean(0)[None], metrics.resampled(both)]).T
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(every > 0, own / every, 0.0)


def among_strongest(found: Found, layers: Sequence[int]) -> int:
    """Count how many of the n ``layers`` are among the n layers that have the strongest effect alone in a search."""
    return len(set(_order(np.array(found.effects))[: len(layers)]) & set(layers))


# --- the searches ---------------------------------------------------------------------------------------------


def localize(
    subject: Experiment | Model | DiffusionPipeline,
    pairs: Sequence[Pair],
    *,
    how: str = "budgeted",
    share: float = SHARE,
    budget: float = BUDGET,
    by: str = "score",
    **settings,
) -> Found:
    """Find the layers that hold the text, with one of SEARCHES.

    ``exhaustive`` sweeps all layers and applies the selection rule.

    ``one-step`` and ``attribution`` draw no pictures. They take the fewest layers whose effects (``sweeps.cheap``,
    averaged over noise levels) add up to ``share`` of the effects of all layers. ``attention``, a baseline, does the
    same with the attention that each layer pays to the tokens in which the prompts differ.

    ``budgeted`` first sorts the layers by their one-step effects on a few pairs. Then it draws leading sets on more and
    more pairs. A set is dropped early if it is surely too small or surely larger than needed. The search ends when one
    set is left, or when the next round would cost more than ``budget`` times the exhaustive sweep over the same pairs.
    The screen and one round are always done. The tests are corrected for all interim tests of all sets: the chance that
    any decision is wrong is ERROR.

    ``by`` is one of EFFECTS, for searches that draw pictures. ``settings`` are those of ``experiment.Experiment``. With
    ``publish`` the outcome is written to the package's data as ``results/localize_MODEL_SEARCH.csv``, or as
    ``localize_MODEL_FACTOR_SEARCH.csv`` if the pairs differ in a factor other than the text (see :func:`published`).
    Raises TextlocError for an invalid search before anything is drawn.

    >>> pair = Pair.of('A sign that says "HELLO".', "WORLD", seed=1)
    >>> found = localize(pipe, [pair], how="one-step", steps=2)
    >>> len(found.effects), found.row_evaluations
    (8, 28)
    """
    experiment, pairs = Experiment.of(subject, **settings), check_pairs(pairs)
    check_distinct(experiment.model, pairs)
    if how not in SEARCHES:
        raise TextlocError(f"unknown search {how!r}; allowed: {', '.join(SEARCHES)}")
    if by not in EFFECTS:
        raise TextlocError(f"sets are compared by {' or '.join(EFFECTS)}, got {by!r}")
    if len(kinds := {_factor(pair) for pair in pairs}) > 1:
        raise TextlocError(f"one search is for one factor; the pairs differ in {', '.join(sorted(kinds))}")
    if not 0 < share <= 1:
        raise TextlocError(f"the share to reach must be above 0 and at most 1, got {share}")
    if not 0 < budget <= 1:
        raise TextlocError(
            f"the budget is a share of the exhaustive sweep's cost; it must be above 0 and at most 1, got {budget}"
        )
    if len({pair.seed for pair in pairs}) < len(pairs):
        raise TextlocError("two of the pairs have the same seed; give each pair a different seed")
    began, spent = time.perf_counter(), Spent(experiment.store)
    if how == "exhaustive":
        found = _exhaustive(experiment, pairs, share, by)
    elif how == "budgeted":
        found = _budgeted(experiment, pairs, share, budget, by)
    else:
        found = _cheap_only(experiment, pairs, share, how)
    found = replace(found, seconds=time.perf_counter() - began)
    if experiment.publish:
        key = _key(experiment, pairs, how, share, budget, by)
        table, about = _outcome(experiment, pairs, found), {"found": asdict(found), "key": key}
        experiment.write(_name(experiment, pairs, how), table, seconds=spent.seconds, **about)
    return found


def published(
    experiment: Experiment,
    pairs: Sequence[Pair],
    how: str,
    *,
    share: float = SHARE,
    budget: float = BUDGET,
    by: str = "score",
) -> tuple[Found, pd.DataFrame]:
    """Return a search's outcome and its table: the published ones if their key matches, else those of a new search.

    After an exhaustive search, the table holds the rows of the sweep and of the set. After a search without pictures,
    it holds the rows of ``sweeps.cheap``. After a budgeted search, it has one row per layer with the layer's effect.
    """
    key = _key(experiment, pairs, how, share, budget, by)
    table = None if experiment.publish else published_store().load_matching(_name(experiment, pairs, how), key)
    if table is None:
        found = localize(experiment, pairs, how=how, share=share, budget=budget, by=by)
        return found, _outcome(experiment, pairs, found)
    told = table.attrs["provenance"]["found"]
    intervals = {name: told[name] and metrics.Interval(**told[name]) for name in ("score", "reached")}
    return Found(**told | intervals | {name: tuple(told[name]) for name in ("layers", "effects")}), table


def _outcome(experiment: Experiment, pairs: Sequence[Pair], found: Found) -> pd.DataFrame:
    if found.search == "exhaustive":
        table, chosen = sweeps.table(experiment, pairs), together(found.layers)
        if chosen.kind == "set":
            # Drawn again together with the plain source, which the search itself does not need.
            drawn = sweeps.table(experiment, pairs, [chosen])
            table = pd.concat([table, drawn[drawn.kind == "set"]], ignore_index=True)
        return table
    if found.search in WITHOUT_PICTURES:
        return sweeps.cheap(experiment, pairs, depth=found.search)
    return pd.DataFrame({"layer": range(len(found.effects)), "effect": found.effects})


def _factor(pair: Pair) -> str:
    """The factor that a search over such pairs looks for."""
    return "text" if pair.source_text != pair.target_text else " ".join(getattr(pair, "differs", ()))


def _name(experiment: Experiment, pairs: Sequence[Pair], how: str) -> str:
    factor = _factor(pairs[0])
    return f"localize_{experiment.name}_{how}" if factor == "text" else f"localize_{experiment.name}_{factor}_{how}"


def _key(experiment: Experiment, pairs: Sequence[Pair], how: str, share: float, budget: float, by: str) -> dict:
    rule = {"rows": sweeps.ROWS, "pairs": digest_of(pairs), "share": share}
    rule |= {"budget": budget} if how == "budgeted" else {}
    rule |= {"by": by} if by != "score" else {}
    rule |= {"levels": onestep.LEVELS} if how in WITHOUT_PICTURES else {}
    return experiment.key | rule


class _Drawn:
    """The sets of layers that were drawn so far on some pairs. Draws only what is missing."""

    def __init__(self, experiment: Experiment, by: str, table: pd.DataFrame | None = None):
        self.experiment, self.by = experiment, by
        self.table: Any = table  # None until the first set is drawn
        self.rows = 0.0 if table is None else table.row_evaluations.sum()
        self._effects: pd.DataFrame | None = None  # effects of the current table

    def ask(self, sets: Sequence[tuple[int, ...]], pairs: Sequence[Pair]) -> None:
        """Draw the sets, and all layers, on the pairs on which they were not drawn yet."""
        wanted = [*map(together, sets), every_layer(self.experiment.model)]
        places = ["seed", "kind", "layers"]
        known = set() if self.table is None else set(self.table[places].itertuples(index=False, name=None))
        groups: dict[tuple[Site, ...], list[Pair]] = {}
        for pair in pairs:
            lacking = (site for site in wanted if (pair.seed, site.kind, joined(site.layers)) not in known)
            groups.setdefault(tuple(lacking), []).append(pair)
        for missing, group in groups.items():
            if missing:
                new = sweeps.table(self.experiment, group, missing, source=False)
                self.rows += new.row_evaluations.sum()
                self._effects = None
                new = new[new.kind != "target"]
                self.table = new if self.table is None else pd.concat([self.table, new], ignore_index=True)

    @property
    def effects(self) -> pd.DataFrame:
        if self._effects is None:
            self._effects = sweeps.set_effects(self.table, self.by)
        return self._effects

    def reached(self, layers: Sequence[int]) -> np.ndarray:
        return reached(self.effects, layers)

    def score(self, layers: Sequence[int]) -> metrics.Interval:
        of_set = self.table.kind.isin(["layer", "set"]) & (self.table.layers == joined(layers))
        return metrics.bootstrap(self.table[of_set].target_score)


def _exhaustive(experiment: Experiment, pairs: Sequence[Pair], share: float, by: str) -> Found:
    drawn = _Drawn(experiment, by, sweeps.table(experiment, pairs))
    effects = sweeps.layer_table(drawn.table).mean().to_numpy()
    order = _order(_moved(drawn.table))
    for n in range(1, len(order) + 1):
        chosen = tuple(sorted(order[:n]))
        drawn.ask([chosen], pairs)
        if drawn.reached(chosen)[0] >= share:
            break
    for layer in reversed(order):
        fewer = tuple(i for i in chosen if i != layer)
        if layer in chosen and fewer:
            drawn.ask([fewer], pairs)
            if drawn.reached(fewer)[0] >= share:
                chosen = fewer
    return _found("exhaustive", chosen, effects, drawn, share, len(pairs), drawn.rows)


def _budgeted(experiment: Experiment, pairs: Sequence[Pair], share: float, budget: float, by: str) -> Found:
    limit = budget * len(pairs) * _cost(experiment, len(single_layers(experiment.model)) + 1)
    screened = sweeps.cheap(experiment, pairs[:SCREEN])
    effects = sweeps.layer_table(screened).mean().to_numpy()
    order, spent = _order(effects), screened.row_evaluations.sum()
    leading = _leading(effects, SCREENED)
    drawn = _Drawn(experiment, by)
    chosen: tuple[int, ...] = ()
    seen, sure, error = 0, True, ERROR
    while True:
        error /= 2  # the number of races is not known in advance, and the halves add up to ERROR at most
        # First the leading sets race. Then the chosen set races against its subsets with one layer left out.
        if not chosen:
            sets = [tuple(sorted(order[:n])) for n in range(1, leading + 1)]
        else:
            sets = [tuple(i for i in chosen if i != layer) for layer in reversed(order) if layer in chosen] + [chosen]
        best, seen, decided = _race(drawn, sets, pairs, share, limit - spent, seen, error)
        sure = sure and decided
        if best is None and leading < len(order):  # even the largest set is too small
            leading, chosen = min(len(order), 2 * leading), ()
            continue
        best = sets[-1] if best is None else best
        if best == chosen or len(best) == 1:
            return replace(_found("budgeted", best, effects, drawn, share, seen, spent + drawn.rows), sure=sure)
        chosen = best


def _race(
    drawn: _Drawn,
    sets: list[tuple[int, ...]],
    pairs: Sequence[Pair],
    share: float,
    limit: float,
    seen: int,
    error: float,
) -> tuple[tuple[int, ...] | None, int, bool]:
    """Return the smallest set that reaches the share (or None), the number of pairs used, and whether it is sure.

    ``error`` is the chance that any of the race's decisions is wrong.
    """
    alive, n = list(sets), max(seen, min(FIRST, len(pairs)))
    error = error / (len(sets) * _looks(n, len(pairs)))
    while True:
        drawn.ask(alive, pairs[:n])
        values = {s: drawn.reached(s) for s in alive}
        bounds = {s: _surplus(drawn.effects, s, share, error) for s in alive}
        sure = [s for s in alive if bounds[s][0] >= 0]
        most = min(map(len, sure), default=len(sets[-1]))
        alive = [s for s in alive if bounds[s][1] >= 0 and (len(s) < most or s in sure[:1] or not sure)]
        more = min(len(pairs), int(np.ceil(n * GROWTH)))
        cost = (more - n) * _cost(drawn.experiment, len(alive) + 1)
        decided = len(alive) <= 1 and (not alive or alive[0] in sure)
        if decided or more == n or drawn.rows + cost > limit:
            good = [s for s in alive if values[s][0] >= share]
            return (min(good, key=len) if good else None), n, decided
        n = more


def _looks(n: int, most: int) -> int:
    """How often a race that begins with ``n`` pairs can test its sets until it has seen ``most`` pairs."""
    looks = 1
    while n < most:
        n, looks = min(most, int(np.ceil(n * GROWTH))), looks + 1
    return looks


def _surplus(effects: pd.DataFrame, layers: Sequence[int], share: float, error: float) -> tuple[float, float]:
    """Bounds on a set's mean effect minus ``share`` times the mean effect of all layers.

    The bounds are Student's interval at this ``error``. Each end adds one imagined pair to those that were drawn. In
    this pair, all layers draw the whole text, and the set draws nothing of it (lower end) or all of it (upper end). So
    a few pairs that agree are never enough to be sure.
    """
    both = effects[[joined(layers), "all"]].dropna().to_numpy()
    surplus = both[:, 0] - share * both[:, 1]
    ends = []
    for other, side in ((-share, -1), (1 - share, 1)):
        x = np.append(surplus, other)
        ends.append(float(x.mean() + side * stats.t.ppf(1 - error / 2, len(x) - 1) * stats.sem(x)))
    return ends[0], ends[1]


def _cost(experiment: Experiment, sources: int) -> int:
    """Row evaluations of one pair with this many pictures of the source. Each batch also draws the target."""
    rows = sources + math.ceil(sources / (rows_per_call(experiment.model) - 1))
    return rows * experiment.steps * experiment.model.evaluations(experiment.guidance)


def _cheap_only(experiment: Experiment, pairs: Sequence[Pair], share: float, how: str) -> Found:
    table = sweeps.cheap(experiment, pairs, depth=how)
    layers = sweeps.layer_table(table)

    def choose(mean: np.ndarray) -> tuple[int, ...]:
        return tuple(sorted(_order(mean)[: _leading(mean, share)]))

    values = layers.to_numpy()
    means = np.maximum(np.concatenate([values.mean(0)[None], metrics.resampled(values)]), 0)
    chosen = choose(means[0])
    estimate, *part = means[:, chosen].sum(1) / np.maximum(means.sum(1), 1e-12)
    return Found(
        model=experiment.name,
        search=how,
        layers=chosen,
        effects=tuple(layers.mean().tolist()),
        score=None,
        reached=metrics.Interval(float(estimate), *metrics.percentiles(part), len(pairs)),
        confidence=float(np.mean([choose(mean) == chosen for mean in means[1:]])),
        share=parameter_share(experiment.model, chosen),
        pairs=len(pairs),
        row_evaluations=round(table.row_evaluations.sum()),
        seconds=0.0,
    )


def _moved(table: pd.DataFrame) -> np.ndarray:
    """How much each layer alone changes the text in a sweep: its text effect plus the source score that it removes."""
    plain = table[table.kind == "source"].set_index("seed").source_score
    taken = table.assign(target_score=table.seed.map(plain) - table.source_score, floor=0.0)
    return (sweeps.layer_table(table) + sweeps.layer_table(taken)).mean().to_numpy()


def _order(effects: np.ndarray) -> list[int]:
    """Layers by effect, the strongest first."""
    return [int(i) for i in np.argsort(-np.asarray(effects), kind="stable")]


def _leading(effects: np.ndarray, share: float) -> int:
    """Number of layers, the strongest first, that hold this share of the sum of all effects above 0."""
    sums = np.cumsum(np.maximum(effects[_order(effects)], 0))
    return min(len(effects), int(np.searchsorted(sums, (share - 1e-9) * sums[-1])) + 1)


def parameter_share(model: Model, layers: Sequence[int]) -> float:
    """Share of the denoiser's parameters that is in the key and value maps of these layers."""
    total = sum(p.numel() for p in model.denoiser.parameters())
    return sum(key_value_numbers(model.denoiser, model.layers[i]) for i in set(layers)) / total


def _found(
    how: str, layers: tuple[int, ...], effects: np.ndarray, drawn: _Drawn, share: float, pairs: int, rows: float
) -> Found:
    compared = [tuple(map(int, name.split())) for name in drawn.effects if name != "all"]
    values = {s: drawn.reached(s)[1:] for s in compared}
    own = values[layers]
    low, high = metrics.percentiles(own)
    if drawn.by == "exact":
        # Even if all drawn pairs agree, the next pair may not.
        low, high = (
            metrics.percentiles(reached(_with_one_more(drawn.effects, layers, end), layers)[1:])[i]
            for i, end in enumerate((0.0, 1.0))
        )
    # The same set is chosen in a resample if it reaches the share and no smaller set does.
    smaller = [v >= share for s, v in values.items() if len(s) < len(layers)]
    same = (own >= share) & ~np.any(smaller, axis=0) if smaller else own >= share
    return Found(
        model=drawn.experiment.name,
        search=how,
        layers=layers,
        effects=tuple(float(e) for e in effects),
        score=drawn.score(layers),
        reached=metrics.Interval(float(drawn.reached(layers)[0]), low, high, len(drawn.effects)),
        confidence=float(np.mean(same)),
        share=parameter_share(drawn.experiment.model, layers),
        pairs=pairs,
        row_evaluations=round(rows),
        seconds=0.0,
    )


def _with_one_more(effects: pd.DataFrame, layers: Sequence[int], effect: float) -> pd.DataFrame:
    """Add one pair to a table of effects: all layers draw the whole text in it, and the set draws ``effect`` of it."""
    return pd.concat([effects, pd.DataFrame([{joined(layers): effect, "all": 1.0}])], ignore_index=True)
