"""What the layers carry: text against colours, steps, heads, keys against values, the pooled text, the word's length.

A study patches its own set of sites in its own pairs (``localize.sweep``); the functions here make its tables short.
The tables that come with the package are taken where they are of the same weights, pairs, sites and steps.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from textloc_utils import localize
from textloc_utils.localize import Site
from textloc_utils.models import Model, check_layers, load, training_log
from textloc_utils.prompts import Pair, make_pairs
from textloc_utils.results import Store
from textloc_utils.settings import TextlocError

FOUND = "found layers"  #: the site that patches the localized set
WINDOW = (0.0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8)  #: shares of the steps at which a patch starts or stops


def _every(model: Model) -> tuple[int, ...]:
    return tuple(range(len(model.layers)))


def _base(model: Model, layers: tuple[int, ...]) -> dict[str, Site]:
    return {FOUND: Site(layers=layers), "all layers": Site(layers=_every(model))}


def _colours(model: Model, layers: tuple[int, ...], steps: int) -> dict[str, Site]:
    """Each layer alone, and the set against all the others: whose text, whose colours?"""
    others = tuple(i for i in _every(model) if i not in layers)
    return localize.single_layers(model) | _base(model, layers) | {"all but the found": Site(layers=others)}


def _steps(model: Model, layers: tuple[int, ...], steps: int) -> dict[str, Site]:
    """The set from a step on, and until a step."""
    at = sorted({round(share * steps) for share in WINDOW} - {0})
    late = {f"from step {k}": Site(layers=layers, start=k) for k in at}
    return _base(model, layers) | late | {f"until step {k}": Site(layers=layers, stop=k) for k in at}


def _parts(model: Model, layers: tuple[int, ...], steps: int) -> dict[str, Site]:
    """The set's keys, its values, each of its heads, and the pooled text."""
    sites = _base(model, layers) | {
        "keys": Site(layers=layers, tensors="k"),
        "values": Site(layers=layers, tensors="v"),
    }
    heads = range(min(model.layers[i].heads for i in layers))
    sites |= {f"head {h}": Site(layers=layers, heads=(h,)) for h in heads}
    if model.pooled_site is not None:
        sites["pooled"] = Site(pooled=True)
        sites[f"{FOUND} + pooled"] = Site(layers=layers, pooled=True)
    return sites


@dataclass(frozen=True, kw_only=True)
class Study:
    """Which sites a study patches, from (model, localized layers, steps), and which pairs it draws, from (n, seed)."""

    sites: Callable[[Model, tuple[int, ...], int], dict[str, Site]]
    pairs: Callable[[int, int], list[Pair]] = make_pairs


STUDIES = {
    "colours": Study(sites=_colours, pairs=lambda n, seed: make_pairs(n, seed, other_colours=True)),
    "steps": Study(sites=_steps),
    "parts": Study(sites=_parts),
    "length": Study(sites=lambda model, layers, steps: _base(model, layers)),
}


def study(
    model: Model,
    name: str,
    layers: Sequence[int],
    n: int,
    seed: int = 42,
    *,
    steps: int | None = None,
    store: Store | None = None,
    progress: bool = False,
    publish: bool = False,
) -> pd.DataFrame:
    """The sweep's table (``localize.patch_pair``) of one of STUDIES for the localized ``layers`` over ``n`` pairs.

    The published table where it fits; otherwise it is drawn now, and with ``publish`` written to the package's data as
    ``results/study_MODEL_NAME.csv``. Raises TextlocError for an unknown study or layers out of range.
    """
    if name not in STUDIES:
        raise TextlocError(f"unknown study {name!r}; allowed: {', '.join(STUDIES)}")
    layers = tuple(sorted(layers))
    if not layers:
        raise TextlocError("a study needs at least one localized layer")
    check_layers(model, layers)
    sites = STUDIES[name].sites(model, layers, steps or model.spec.steps)
    pairs = STUDIES[name].pairs(n, seed)
    key = localize.published_key(model, pairs, steps) | {"sites": {k: asdict(site) for k, site in sites.items()}}

    def make() -> pd.DataFrame:
        return localize.sweep(model, pairs, sites=sites, steps=steps, store=store, progress=progress)

    return localize.published_store().taken_or_made(f"study_{model.spec.name}_{name}", key, make, publish=publish)


# --- short tables ---------------------------------------------------------------------------------------------


def carried(table: pd.DataFrame) -> pd.DataFrame:
    """What each site carries, from the table of the study "colours", whose targets have other colours, too.

    One row per site; columns site, text (mean text effect), wall and sign (share of pictures whose colour is the
    target's when the site is patched; NaN where nobody can tell, as in full-size pictures), n.
    """
    seen = table[~table.site.isin(["source", "target"])]
    seen = seen.assign(text=seen.target_score - seen.floor)
    for name in ("wall", "sign"):
        read = seen.get(f"{name}_read")
        seen[name] = np.nan if read is None else (read == seen[f"target_{name}"]).astype(float)
    groups = seen.groupby("site", sort=False)
    return groups[["text", "wall", "sign"]].mean().assign(n=groups.size()).reset_index()


def windows(table: pd.DataFrame) -> pd.DataFrame:
    """The table of the study "steps" as columns kind ("from step", "until step"), step, mean, low, high, n.

    Effects are in shares of the found set's mean effect over all steps.
    """
    effects = localize.effect_intervals(table).set_index("site")
    whole = effects["mean"][FOUND]
    parts = effects[effects.index.str.contains(" step ")].reset_index()
    named = parts.site.str.extract(r"^(?P<kind>.*) (?P<step>\d+)$").astype({"step": int})
    return named.join(parts[["mean", "low", "high"]] / whole).assign(n=parts.n)


def by_length(table: pd.DataFrame) -> pd.DataFrame:
    """Text effects by the number of letters of source and target, from the table of the study "length".

    Columns source, target (letters), found (mean effect of the set), all (of all layers), n pairs.
    """
    table = table.assign(
        effect=table.target_score - table.floor, source=table.source_text.str.len(), target=table.target_text.str.len()
    )
    part = table[table.site.isin([FOUND, "all layers"])]
    means = part.pivot_table("effect", ["source", "target"], "site")
    means = means.rename(columns={FOUND: "found", "all layers": "all"})[["found", "all"]]
    counted = table[table.site == FOUND].groupby(["source", "target"]).size()
    return means.assign(n=counted).reset_index().rename_axis(columns=None)


def appeared(evaluations: pd.DataFrame, least: float = 0.2) -> dict[str, int]:
    """When a text layer first showed in a training run: its ``samples`` and ``layer``, and ``last``, the final one.

    ``evaluations`` are rows of a training log, columns samples and target (target letters brought by each layer alone).
    The first row counts in which some layer brings at least ``least``. Raises TextlocError if there is none.
    """
    effects = np.array(evaluations.target.tolist())
    strong = np.flatnonzero(effects.max(1) >= least)
    if not len(strong):
        raise TextlocError(f"no layer brought {least:.0%} of the target's letters in this run")
    first = strong[0]
    return {
        "samples": int(evaluations.samples.iloc[first]),
        "layer": int(effects[first].argmax()),
        "last": int(effects[-1].argmax()),
    }


# --- other training seeds ----------------------------------------------------------------------------------------


def publish_seeds(name: str, runs: Sequence[Path], n: int, seed: int = 42, *, progress: bool = False) -> pd.DataFrame:
    """Search the layers of a miniature trained again from other seeds exhaustively, and publish what came out.

    ``runs`` are the folders that ``textloc train --ship`` wrote; the miniature that comes with the package is searched
    beside them, over the same ``n`` pairs. Written to the package's data and returned: ``results/seeds_NAME.csv``, one
    row per training seed and layer with columns training_seed, samples and characters (the training's end), layer,
    mean, low, high (text effect of the layer alone, 95 % interval), chosen (of the localized set), share (of the
    denoiser's parameters), score and reached (of the set, see ``localize.Found``). Beside it
    ``results/seeds_NAME_training.csv``, one row per training seed, evaluation and layer: training_seed, samples,
    characters, layer, target.

    Raises TextlocError for a folder without a miniature, one of another model, and two from one training seed.
    """
    pairs = make_pairs(n, seed)
    shipped = load(name)
    known = training_log(shipped.spec)
    if known is None:
        raise TextlocError(f"{name} is no miniature with a training log")
    trained = {None: known} | {folder: _finished(name, folder) for folder in runs}
    seeds = [log["report"]["seed"] for log in trained.values()]
    if len(set(seeds)) < len(seeds):
        raise TextlocError(
            f"every run must have a training seed of its own, got {seeds} (the first is the shipped one's)"
        )
    rows, logs = [], []
    for folder, log in trained.items():
        model = load(name, model_path=str(folder)) if folder else shipped
        options = {"progress": progress}
        found = localize.search(model, pairs, how="exhaustive", **options)
        effects = localize.effect_intervals(localize.sweep(model, pairs, **options)).set_index("site")
        about = {"training_seed": log["report"]["seed"]}
        end = log["evaluations"][-1]
        rows += [
            about
            | {"samples": end["samples"], "characters": end["characters"], "layer": layer}
            | effects.loc[localize.name_of([layer]), ["mean", "low", "high"]].to_dict()
            | {"chosen": layer in found.layers, "share": found.share}
            | {"score": found.score.mean, "reached": found.reached.mean}
            for layer in range(len(found.effects))
        ]
        logs += [
            about | {"samples": row["samples"], "characters": row["characters"], "layer": layer, "target": target}
            for row in log["evaluations"]
            for layer, target in enumerate(row["target"])
        ]
    told = {"pairs": n, "seed": seed, "training_seeds": seeds, "key": {"weights": localize.fingerprint(shipped)}}
    table = pd.DataFrame(rows)
    localize.published_store().publish(f"seeds_{name}", table, told)
    localize.published_store().publish(f"seeds_{name}_training", pd.DataFrame(logs), told)
    return table


def training_seeds(model: Model) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """What :func:`publish_seeds` published for this very model, None if nothing: its table, and a short one.

    The short one has one row per training seed: training_seed, layers (of the set, joined by spaces), share, score,
    reached and characters, as there, and ``appeared``, the samples after which a layer alone wrote (see
    :func:`appeared`).
    """
    names = (f"seeds_{model.spec.name}", f"seeds_{model.spec.name}_training")
    store, weights = localize.published_store(), localize.fingerprint(model)
    try:
        table, training = map(store.load_published, names)
    except TextlocError:
        return None
    if any(each.attrs["provenance"]["key"]["weights"] != weights for each in (table, training)):
        return None
    rows = []
    for seed, part in table.groupby("training_seed", sort=False):
        log = training[training.training_seed == seed].groupby("samples").target.agg(list).reset_index()
        about = part.iloc[0][["share", "score", "reached", "characters"]]
        layers = " ".join(map(str, part.layer[part.chosen]))
        rows.append({"training_seed": seed, "layers": layers, **about, "appeared": appeared(log)["samples"]})
    return table, pd.DataFrame(rows)


def _finished(name: str, folder: Path) -> dict:
    """The training log of a miniature that ``textloc train --ship`` wrote."""
    try:
        log = json.loads((folder / "training.json").read_text())
    except OSError:
        raise TextlocError(f"{folder} holds no miniature; textloc train {name} --ship {folder} writes one") from None
    if log["report"]["name"] != name:
        raise TextlocError(f"{folder} holds {log['report']['name']}, not {name}")
    return log
