"""Which layers hold the text: patch text layers, read what the picture says, choose the fewest that suffice.

The **text effect** of a patch on a pair is its target score (``metrics.text_score``) less the pair's floor, the score
that the source's own text has against the target's: two words share letters by chance, and a picture that kept its
text has an effect of 0. A set of layers **reaches** the share r of the all-layer patch's effect when its mean effect
over the pairs is r times that one's.

**Selection rule.** Layers are put in the order of how far each alone moves the text, which is its effect and what it
takes of the source's score: a layer may erase the source's text and need others to write. The first set that reaches
``share`` (0.9) is taken; then every layer of it, the weakest first, is left out if the others still reach it.
"""

import contextlib
import hashlib
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd
from scipy import stats
from torch import nn
from tqdm.auto import tqdm

from textloc_utils import metrics, ocr, onestep
from textloc_utils.generate import generate, rows_per_call
from textloc_utils.miniatures import scenes
from textloc_utils.models import Model, check_layers, key_value_numbers
from textloc_utils.patching import Patch
from textloc_utils.prompts import Pair
from textloc_utils.results import Store
from textloc_utils.settings import PATIENCE, TextlocError, data_dir

ROWS = 3  #: part of a stored unit's key: raised whenever its rows change
PSNR_CAP = 60.0  #: dB; two identical pictures would be infinitely alike
SHARE = 0.9  #: of the all-layer patch's text effect
BUDGET = 0.1  #: of the exhaustive sweep's cost
SEARCHES = ("exhaustive", "budgeted", *onestep.DEPTHS)
RESAMPLES = 2000
#: The budgeted search: pairs that are screened, share of the screened effects that the first leading sets hold, pairs
#: of the first round, and their growth from round to round.
SCREEN, SCREENED, FIRST, GROWTH = 6, 0.98, 8, 1.5


# --- the sweep ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Site:
    """A place to patch: what a ``patching.Patch`` has besides its rows."""

    layers: tuple[int, ...] = ()
    pooled: bool = False
    start: int = 0
    stop: int | None = None
    heads: tuple[int, ...] | None = None
    tensors: str = "kv"


def name_of(layers: Sequence[int]) -> str:
    """The name of the site that patches these layers together, as in "layer 3" or "layers 3 5"."""
    return f"layer{'s' * (len(layers) > 1)} " + " ".join(map(str, layers))


def joint(sets: Sequence[Sequence[int]]) -> dict[str, Site]:
    """The sites that patch sets of layers, by name."""
    return {name_of(layers): Site(layers=tuple(layers)) for layers in sets}


def single_layers(model: Model) -> dict[str, Site]:
    """The sites of a sweep: each text layer alone, all layers, the pooled text where there is one, and everything."""
    every = tuple(range(len(model.layers)))
    sites = joint([(i,) for i in every]) | {"all layers": Site(layers=every)}
    if model.pooled_site is not None:
        sites |= {"pooled": Site(pooled=True), "all layers + pooled": Site(layers=every, pooled=True)}
    return sites


def fingerprint(model: Model) -> str:
    """Short hash of a model's weights (64 values of each tensor): other weights make stored results stale.

    A miniature is trained as a whole, so that its denoiser stands for it. Other models may share a denoiser and differ
    in their encoders, autoencoder, second stage or scheduler.
    """
    digest = hashlib.sha256()

    def take(module: nn.Module) -> None:
        for name, tensor in module.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.flatten()[:64].float().cpu().numpy().tobytes())

    take(model.denoiser)
    if not model.spec.miniature:
        stages = [model.pipe.components, model.stage2.components if model.stage2 else {}]
        for name, part in sorted((f"{i} {n}", part) for i, of in enumerate(stages) for n, part in of.items()):
            digest.update(f"{name} {type(part).__name__}".encode())
            if isinstance(part, nn.Module) and part is not model.denoiser:
                take(part)
        settings = {k: v for k, v in model.pipe.scheduler.config.items() if not k.startswith("_")}
        digest.update(repr(sorted(settings.items())).encode())
    return digest.hexdigest()[:16]


def outside_text(model: Model, height: int, width: int) -> np.ndarray:
    """Boolean (height, width), True outside the region where the model's letters can stand (its ``text_box``)."""
    mask = np.ones((height, width), bool)
    if model.spec.text_box is not None:
        left, top, right, bottom = model.spec.text_box
        mask[top:bottom, left:right] = False
    return mask


def patch_pair(
    model: Model,
    pair: Pair,
    sites: dict[str, Site],
    *,
    steps: int | None = None,
    source: bool = True,
    batch_size: int | None = None,
) -> tuple[np.ndarray, list[dict]]:
    """Draw one pair: the source, the target, and the source patched at each site, ``batch_size`` rows at a time.

    One target row serves all patched rows of a batch; every batch draws it again. ``source=False`` leaves out the plain
    source, and with it the columns that compare with it. Returns the pictures, uint8 (pictures, H, W, 3), and one row
    per picture: site, layers (indices joined by spaces), pooled, read (by OCR), target_score and source_score
    (``metrics.text_score``, 0..1), floor (the source's text against the target's), exact (spells the target),
    ssim_outside and psnr_outside (to the plain source, outside the text box; PSNR capped at 60 dB), row_evaluations
    (the pair's, evenly over its pictures); for a miniature also the colours wall_read and sign_read.
    """
    for site in sites.values():
        check_layers(model, site.layers)
    size = batch_size or rows_per_call(model)
    todo = ([Site()] if source else []) + list(sites.values())
    room = max(1, size - 1)
    drawn, cost = [], 0
    for start in range(0, max(1, len(todo)), room):
        part = todo[start : start + room]
        patches = [Patch(source=1 + i, target=0, **vars(site)) for i, site in enumerate(part) if site != Site()]
        rows = 1 + len(part)
        made = generate(
            model, [pair.target] + [pair.source] * len(part), [pair.seed] * rows, patches=patches, steps=steps
        )
        drawn += list(made.images[1:] if start else made.images)
        cost += made.row_evaluations
    pictures = np.stack([*drawn[1:2], drawn[0], *drawn[2:]] if source else drawn)
    names = ({"source": Site()} if source else {}) | {"target": Site()} | sites
    rows = [
        {
            "model": model.spec.name,
            "seed": pair.seed,
            **{k: getattr(pair, k) for k in ("wall", "sign", "target_wall", "target_sign")},
            "source_text": pair.source_text,
            "target_text": pair.target_text,
            "site": name,
            "layers": " ".join(map(str, site.layers)),
            "pooled": site.pooled,
            "read": text,
            "target_score": metrics.text_score(text, pair.target_text),
            "source_score": metrics.text_score(text, pair.source_text),
            "floor": metrics.text_score(pair.source_text, pair.target_text),
            "exact": metrics.exact_match(text, pair.target_text),
            "row_evaluations": cost / len(pictures),
        }
        for (name, site), text in zip(names.items(), ocr.read(pictures), strict=True)
    ]
    if source:
        mask = outside_text(model, *pictures.shape[1:3])
        plain = np.broadcast_to(pictures[:1], pictures.shape)
        ssim = metrics.ssim(pictures, plain, mask)
        psnr = metrics.psnr(pictures, plain, mask, cap=PSNR_CAP)
        for row, a, b in zip(rows, ssim, psnr, strict=True):
            row |= {"ssim_outside": float(a), "psnr_outside": float(b)}
    if model.spec.miniature:
        for row, picture in zip(rows, pictures, strict=True):
            row["wall_read"], row["sign_read"] = scenes.read_colours(picture)
    return pictures, rows


def sweep(
    model: Model,
    pairs: Sequence[Pair],
    *,
    sites: dict[str, Site] | None = None,
    steps: int | None = None,
    source: bool = True,
    store: Store | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Patch every site (default: :func:`single_layers`) in every pair; one row per pair and picture.

    Columns as :func:`patch_pair`. Each pair is a unit of the store, so that a killed sweep goes on where it was, and
    processes started together (``accelerate launch``) share the pairs out; each of them returns the whole table.
    """
    sites = single_layers(model) if sites is None else sites
    inputs = {
        "rows": ROWS,
        "sites": {name: asdict(site) for name, site in sites.items()},
        "source": source,
        "guidance": model.spec.guidance,
    }
    return units(
        "sweep",
        model,
        pairs,
        inputs,
        steps,
        lambda pair: patch_pair(model, pair, sites, steps=steps, source=source)[1],
        store,
        progress,
    )


def cheap(
    model: Model,
    pairs: Sequence[Pair],
    *,
    depth: str = "one-step",
    steps: int | None = None,
    store: Store | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """The table of :func:`onestep.effects`, pair by pair in the store as :func:`sweep`'s."""
    onestep.check_depth(depth)
    inputs = {"rows": ROWS, "depth": depth, "levels": onestep.LEVELS, "guidance": model.spec.guidance}

    def compute(pair: Pair) -> pd.DataFrame:
        return onestep.effects(model, [pair], depth=depth, steps=steps)

    return units("effects", model, pairs, inputs, steps, compute, store, progress)


def units(
    kind: str,
    model: Model,
    pairs: Sequence[Pair],
    inputs: dict,
    steps: int | None,
    compute: Callable[[Pair], pd.DataFrame | list[dict]],
    store: Store | None,
    progress: bool,
) -> pd.DataFrame:
    """One stored unit per pair, shared out over the processes; every process returns all of them, in order.

    ``inputs`` is what a unit hangs on besides model, weights, steps and pair.
    """
    if not pairs:
        raise TextlocError("this needs at least one pair of prompts")
    store = Store() if store is None else store
    inputs = inputs | {"model": model.spec.name, "weights": fingerprint(model), "steps": steps or model.spec.steps}

    def unit(pair: Pair) -> pd.DataFrame:
        return store.unit(kind, inputs | {"pair": asdict(pair)}, lambda: compute(pair), model=model)

    def bar(todo):
        return tqdm(todo, desc=f"{model.spec.name}: pairs", unit="pair", disable=not progress)

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from accelerate import PartialState

        state = PartialState(cpu=model.device.type == "cpu", timeout=PATIENCE)
        for pair in bar(pairs[state.process_index :: state.num_processes]):
            unit(pair)
        state.wait_for_everyone()
    return pd.concat([unit(pair) for pair in bar(pairs)], ignore_index=True)


# --- what a table says ----------------------------------------------------------------------------------------


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Mean, 95 % interval and n per site, in the sweep's order.

    Columns: site, and for each of target_score, source_score, exact, ssim_outside, psnr_outside the mean under
    that name, ``_low`` and ``_high``; n pairs.
    """
    rows = []
    for site, part in table.groupby("site", sort=False):
        row = {"site": site}
        for score in ("target_score", "source_score", "exact", "ssim_outside", "psnr_outside"):
            interval = metrics.estimate(part[score])
            row |= {score: interval.mean, f"{score}_low": interval.low, f"{score}_high": interval.high}
        rows.append(row | {"n": len(part)})
    return pd.DataFrame(rows)


def text_effects(table: pd.DataFrame) -> pd.DataFrame:
    """Text effects of a sweep's table: one row per pair (its seed), one column per site, NaN where not drawn."""
    return table.assign(effect=table.target_score - table.floor).pivot(index="seed", columns="site", values="effect")


def effect_intervals(table: pd.DataFrame) -> pd.DataFrame:
    """Mean text effect per site of a sweep's table with its 95 % interval: columns site, mean, low, high, n."""
    effects = text_effects(table)
    sites = [s for s in dict.fromkeys(table.site) if s not in ("source", "target")]
    return pd.DataFrame([{"site": s, **asdict(metrics.bootstrap(effects[s].dropna()))} for s in sites])


def reached(effects: pd.DataFrame, site: str, *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Share of the all-layer patch's effect that a site reaches: the estimate, then ``resamples`` bootstrap values.

    Pairs are resampled whole, the same ones for every site of a table; a pair counts where the site was drawn.
    """
    both = effects[[site, "all layers"]].to_numpy()
    drawn = ~np.isnan(both).any(1)
    both = np.where(drawn[:, None], both, 0.0)
    if both[:, 1].sum() <= 0:
        raise TextlocError("patching all layers brings no target text: there is nothing to localize in this model")
    rows = np.random.default_rng(seed).integers(len(both), size=(resamples, len(both)))
    # Both are taken over the same pairs, so that their sums have the ratio of their means.
    sums = np.concatenate([both.sum(0)[None], both[rows].sum(1)])
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[:, 1] > 0, sums[:, 0] / sums[:, 1], 0.0)


def rank_agreement(a: pd.DataFrame, b: pd.DataFrame, *, resamples: int = RESAMPLES, seed: int = 0) -> metrics.Interval:
    """Spearman correlation over layers of the mean effects in two tables (pairs x layers), pairs resampled in each."""
    rng = np.random.default_rng(seed)
    a, b = a.to_numpy(), b.to_numpy()

    def once(x, y) -> float:
        # Constant effects have no ranks to agree on.
        return (
            float(stats.spearmanr(x.mean(0), y.mean(0)).statistic) if np.ptp(x.mean(0)) and np.ptp(y.mean(0)) else 0.0
        )

    values = [once(*(x[rng.integers(len(x), size=len(x))] for x in (a, b))) for _ in range(resamples)]
    low, high = np.percentile(values, [2.5, 97.5])
    return metrics.Interval(once(a, b), float(low), float(high), min(len(a), len(b)))


def layer_table(table: pd.DataFrame) -> pd.DataFrame:
    """Effects of single layers, pairs x layers, from a sweep's table or from one of :func:`cheap`."""
    if "depth" in table:
        return table.pivot_table("effect", "seed", "layer", aggfunc="mean")
    effects = text_effects(table)
    names = [s for s in effects if s.startswith("layer ")]
    return effects[sorted(names, key=lambda s: int(s.split()[1]))]


# --- the searches ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found.

    ``layers`` is the set, ``effects`` the mean effect of each layer alone (text effects, or one-step ones), ``score``
    the set's mean target score (None where nothing was drawn), ``reached`` the share of the all-layer patch's effect,
    ``confidence`` the share of bootstrap resamples of the pairs in which the same set comes out of those compared (each
    on the pairs on which it was drawn),
    ``share`` its part of the denoiser's parameters (key and value maps), ``row_evaluations`` the cost, units that were
    already stored included, and ``seconds`` the wall time of this run.
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


def search(
    model: Model,
    pairs: Sequence[Pair],
    *,
    how: str = "budgeted",
    share: float = SHARE,
    budget: float = BUDGET,
    steps: int | None = None,
    store: Store | None = None,
    progress: bool = False,
) -> Found:
    """Find the layers that hold the text, by one of SEARCHES.

    ``exhaustive``: :func:`sweep` and the selection rule. ``one-step`` and ``attribution``: the fewest layers whose
    effects (:func:`cheap`, averaged over noise levels) add up to ``share`` of all layers'; no picture is drawn.
    ``budgeted``: layers in the order of their one-step effects on a few pairs, then leading sets drawn on ever more
    pairs, the ones dropped early that surely fall short or are surely larger than needed; it ends when one set is left
    or the next round would cost more than ``budget`` times the exhaustive sweep over the same pairs (the screen and one
    round are always done).
    """
    if how not in SEARCHES:
        raise TextlocError(f"unknown search {how!r}; allowed: {', '.join(SEARCHES)}")
    if not 0 < share <= 1:
        raise TextlocError(f"the share to reach must lie above 0 and not above 1, got {share}")
    if not 0 < budget <= 1:
        raise TextlocError(
            f"the budget is a share of the exhaustive sweep's cost, above 0 and not above 1, got {budget}"
        )
    began = time.perf_counter()
    options = {"steps": steps, "store": store, "progress": progress}
    if how == "exhaustive":
        found = _exhaustive(model, pairs, share, options)
    elif how == "budgeted":
        found = _budgeted(model, pairs, share, budget, options)
    else:
        found = _cheap_only(model, pairs, share, how, options)
    return replace(found, seconds=time.perf_counter() - began)


class _Drawn:
    """Sets of layers drawn so far on some pairs; draws only what is missing."""

    def __init__(self, model: Model, options: dict, table: pd.DataFrame | None = None):
        self.model, self.options, self.table = model, options, table
        self.rows = 0.0 if table is None else table.row_evaluations.sum()
        self._effects: pd.DataFrame | None = None  # of the table as it is

    def ask(self, sets: Sequence[tuple[int, ...]], pairs: Sequence[Pair]) -> None:
        """Draw the sets, and all layers, on those of the pairs on which they are missing."""
        sites = joint(sets) | {"all layers": Site(layers=tuple(range(len(self.model.layers))))}
        groups: dict[tuple[str, ...], list[Pair]] = {}
        known = set() if self.table is None else set(zip(self.table.seed, self.table.site, strict=True))
        for pair in pairs:
            missing = tuple(name for name in sites if (pair.seed, name) not in known)
            groups.setdefault(missing, []).append(pair)
        for missing, group in groups.items():
            if missing:
                chosen = {name: sites[name] for name in missing}
                new = sweep(self.model, group, sites=chosen, source=False, **self.options)
                self.rows += new.row_evaluations.sum()
                self._effects = None
                new = new[new.site != "target"]
                self.table = new if self.table is None else pd.concat([self.table, new], ignore_index=True)

    @property
    def effects(self) -> pd.DataFrame:
        if self._effects is None:
            self._effects = text_effects(self.table[~self.table.site.isin(["source", "target"])])
        return self._effects

    def reached(self, layers: Sequence[int]) -> np.ndarray:
        return reached(self.effects, name_of(layers))

    def score(self, layers: Sequence[int]) -> metrics.Interval:
        return metrics.bootstrap(self.table[self.table.site == name_of(layers)].target_score)


def _exhaustive(model: Model, pairs: Sequence[Pair], share: float, options: dict) -> Found:
    drawn = _Drawn(model, options, sweep(model, pairs, **options))
    effects = layer_table(drawn.table).mean().to_numpy()
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
    return _found(model, "exhaustive", chosen, effects, drawn, share, len(pairs), drawn.rows)


def _budgeted(model: Model, pairs: Sequence[Pair], share: float, budget: float, options: dict) -> Found:
    limit = budget * len(pairs) * _cost(model, len(single_layers(model)) + 1, options["steps"])
    screened = cheap(model, pairs[:SCREEN], **options)
    effects = layer_table(screened).mean().to_numpy()
    order, spent = _order(effects), screened.row_evaluations.sum()
    leading = _leading(effects, SCREENED)
    drawn = _Drawn(model, options)
    chosen, seen = (), 0
    while True:
        # Leading sets at first; then the set that was found, against itself with one layer left out.
        if not chosen:
            sets = [tuple(sorted(order[:n])) for n in range(1, leading + 1)]
        else:
            sets = [tuple(i for i in chosen if i != layer) for layer in reversed(order) if layer in chosen] + [chosen]
        best, seen = _race(drawn, sets, pairs, share, limit - spent, seen)
        if best is None and leading < len(order):  # even the largest falls short
            leading, chosen = min(len(order), 2 * leading), ()
            continue
        best = sets[-1] if best is None else best
        if best == chosen or len(best) == 1:
            return _found(model, "budgeted", best, effects, drawn, share, seen, spent + drawn.rows)
        chosen = best


def _race(
    drawn: _Drawn,
    sets: list[tuple[int, ...]],
    pairs: Sequence[Pair],
    share: float,
    limit: float,
    seen: int,
) -> tuple[tuple[int, ...] | None, int]:
    """The smallest of the sets that reaches the share, None if none does, and the number of pairs it was drawn on."""
    alive, n = list(sets), max(seen, min(FIRST, len(pairs)))
    while True:
        drawn.ask(alive, pairs[:n])
        values = {s: drawn.reached(s) for s in alive}
        bounds = {s: np.percentile(values[s][1:], [2.5, 97.5]) for s in alive}
        sure = [s for s in alive if bounds[s][0] >= share]
        most = min(map(len, sure), default=len(sets[-1]))
        alive = [s for s in alive if bounds[s][1] >= share and (len(s) < most or s in sure[:1] or not sure)]
        more = min(len(pairs), int(np.ceil(n * GROWTH)))
        cost = (more - n) * _cost(drawn.model, len(alive) + 1, drawn.options["steps"])
        if len(alive) <= 1 and (not alive or alive[0] in sure) or more == n or drawn.rows + cost > limit:
            good = [s for s in alive if values[s][0] >= share]
            return (min(good, key=len) if good else None), n
        n = more


def _cost(model: Model, sources: int, steps: int | None) -> int:
    """Row evaluations of one pair with this many pictures of the source: each batch draws the target, too."""
    rows = sources + math.ceil(sources / (rows_per_call(model) - 1))
    return rows * (steps or model.spec.steps) * model.evaluations()


def _cheap_only(model: Model, pairs: Sequence[Pair], share: float, how: str, options: dict) -> Found:
    table = cheap(model, pairs, depth=how, **options)
    layers = layer_table(table)

    def choose(mean: np.ndarray) -> tuple[int, ...]:
        return tuple(sorted(_order(mean)[: _leading(mean, share)]))

    values = layers.to_numpy()
    rows = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    means = np.maximum(np.concatenate([values.mean(0)[None], values[rows].mean(1)]), 0)
    chosen = choose(means[0])
    estimate, *part = means[:, chosen].sum(1) / np.maximum(means.sum(1), 1e-12)
    return Found(
        model=model.spec.name,
        search=how,
        layers=chosen,
        effects=tuple(layers.mean().tolist()),
        score=None,
        reached=metrics.Interval(float(estimate), *map(float, np.percentile(part, [2.5, 97.5])), len(pairs)),
        confidence=float(np.mean([choose(mean) == chosen for mean in means[1:]])),
        share=parameter_share(model, chosen),
        pairs=len(pairs),
        row_evaluations=round(table.row_evaluations.sum()),
        seconds=0.0,
    )


def _moved(table: pd.DataFrame) -> np.ndarray:
    """How far each layer alone moves the text in a sweep: its text effect and what it takes of the source's score."""
    gained = layer_table(table)
    left = table.pivot(index="seed", columns="site", values="source_score")
    return (gained - left[gained.columns].sub(left["source"], axis=0)).mean().to_numpy()


def _order(effects: np.ndarray) -> list[int]:
    """Layers by effect, the strongest first."""
    return [int(i) for i in np.argsort(-np.asarray(effects), kind="stable")]


def _leading(effects: np.ndarray, share: float) -> int:
    """How many layers, the strongest first, hold this share of the sum of all effects above 0."""
    sums = np.cumsum(np.maximum(effects[_order(effects)], 0))
    return min(len(effects), int(np.searchsorted(sums, (share - 1e-9) * sums[-1])) + 1)


def parameter_share(model: Model, layers: Sequence[int]) -> float:
    """Part of the denoiser's parameters that the key and value maps of these layers hold."""
    total = sum(p.numel() for p in model.denoiser.parameters())
    return sum(key_value_numbers(model.denoiser, model.layers[i]) for i in set(layers)) / total


def _found(
    model: Model,
    how: str,
    layers: tuple[int, ...],
    effects: np.ndarray,
    drawn: _Drawn,
    share: float,
    pairs: int,
    rows: float,
) -> Found:
    compared = {tuple(map(int, s.split()[1:])) for s in drawn.effects if s.startswith("layer")}
    values = {s: drawn.reached(s)[1:] for s in compared}
    own = values[layers]
    # The same set comes out where it reaches the share and no smaller one does.
    smaller = [v >= share for s, v in values.items() if len(s) < len(layers)]
    same = (own >= share) & ~np.any(smaller, axis=0) if smaller else own >= share
    return Found(
        model=model.spec.name,
        search=how,
        layers=layers,
        effects=tuple(float(e) for e in effects),
        score=drawn.score(layers),
        reached=metrics.Interval(
            float(drawn.reached(layers)[0]), *map(float, np.percentile(own, [2.5, 97.5])), len(drawn.effects)
        ),
        confidence=float(np.mean(same)),
        share=parameter_share(model, layers),
        pairs=pairs,
        row_evaluations=round(rows),
        seconds=0.0,
    )


# --- what the project publishes ---------------------------------------------------------------------------------


def publish(
    model: Model,
    pairs: Sequence[Pair],
    found: Found,
    *,
    share: float = SHARE,
    budget: float = BUDGET,
    steps: int | None = None,
    **options,
) -> None:
    """Write a search's outcome to the package's data, as ``results/localize_MODEL_SEARCH.csv`` with its provenance.

    The table holds the sweep's rows and those of the set after an exhaustive search, :func:`cheap`'s rows after one
    without pictures, and one row per layer with its effect after a budgeted one.
    """
    table = _outcome(model, pairs, found, steps, options)
    about = {"found": asdict(found), "key": _search_key(model, pairs, found.search, share, budget, steps)}
    published_store().publish(_published_name(model, found.search), table, about)


def published(
    model: Model,
    pairs: Sequence[Pair],
    how: str,
    *,
    share: float = SHARE,
    budget: float = BUDGET,
    steps: int | None = None,
    **options,
) -> tuple[Found, pd.DataFrame]:
    """A search's outcome and its table (see :func:`publish`).

    The published one where it is of the same weights, pairs, steps and rule; otherwise the search is done now.
    """
    key = _search_key(model, pairs, how, share, budget, steps)
    table = published_store().load_matching(_published_name(model, how), key)
    if table is None:
        found = search(model, pairs, how=how, share=share, budget=budget, steps=steps, **options)
        return found, _outcome(model, pairs, found, steps, options)
    told = table.attrs["provenance"]["found"]
    intervals = {name: told[name] and metrics.Interval(**told[name]) for name in ("score", "reached")}
    return Found(**told | intervals | {name: tuple(told[name]) for name in ("layers", "effects")}), table


def known_layers(model: Model) -> tuple[int, ...]:
    """The localized layers of a model: a published search's of the same weights, else the paper's.

    Raises TextlocError for a model of which neither is known.
    """
    for how in ("exhaustive", "budgeted"):
        with contextlib.suppress(TextlocError):
            about = published_store().load_published(_published_name(model, how)).attrs["provenance"]
            if about["key"]["weights"] == fingerprint(model):
                return tuple(about["found"]["layers"])
    if not model.spec.paper_layers:
        raise TextlocError(
            f"the localized layers of {model.spec.name} are not known: name them, or run textloc localize "
            f"{model.spec.name} --publish first"
        )
    return model.spec.paper_layers


def published_store() -> Store:
    """Where the tables lie that come with the package."""
    return Store(data_dir() / "results")


def published_key(model: Model, pairs: Sequence[Pair], steps: int | None) -> dict:
    """What a published table of these pairs hangs on besides its own settings."""
    text = repr([asdict(pair) for pair in pairs])
    return {
        "rows": ROWS,
        "weights": fingerprint(model),
        "pairs": hashlib.sha256(text.encode()).hexdigest()[:16],
        "steps": steps or model.spec.steps,
        "guidance": model.spec.guidance,
    }


def _outcome(model: Model, pairs: Sequence[Pair], found: Found, steps: int | None, options: dict) -> pd.DataFrame:
    if found.search == "exhaustive":
        table = sweep(model, pairs, steps=steps, **options)
        together = name_of(found.layers)
        if together not in set(table.site):
            # Drawn again beside the plain source, which the search itself does not need.
            drawn = sweep(model, pairs, sites=joint([found.layers]), steps=steps, **options)
            table = pd.concat([table, drawn[drawn.site == together]], ignore_index=True)
        return table
    if found.search in onestep.DEPTHS:
        return cheap(model, pairs, depth=found.search, steps=steps, **options)
    return pd.DataFrame({"layer": range(len(found.effects)), "effect": found.effects})


def _published_name(model: Model, how: str) -> str:
    return f"localize_{model.spec.name}_{how}"


def _search_key(model: Model, pairs: Sequence[Pair], how: str, share: float, budget: float, steps: int | None) -> dict:
    rule = {"share": share} | ({"budget": budget} if how == "budgeted" else {})
    rule |= {"levels": onestep.LEVELS} if how in onestep.DEPTHS else {}
    return published_key(model, pairs, steps) | rule
