"""Miniatures that are trained several times: with other seeds, with other depths, or with planted layers.

Planted layers (``miniatures.planted``) are known to hold the letters. All these trainings use the plain world
(``miniatures.world``). Their tables answer three questions. Do all trainings keep their text in equally few layers? Do
these layers do the same in all trainings? Do the searches find the planted layers?
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from textloc_utils import localization, scene_pairs, specificity, sweeps
from textloc_utils.experiment import Experiment, Spent, fingerprint, published_store
from textloc_utils.localization import Found
from textloc_utils.models import Model, load
from textloc_utils.results import NotPublishedError
from textloc_utils.settings import TextlocError
from textloc_utils.sites import Site, joined

#: The parts of a run's set that are patched on reported pairs: the whole set, and parts of it.
PARTS: dict[str, dict] = {
    "exact": {},
    "keys": {"tensors": "k"},
    "values": {"tensors": "v"},
    "letters": {"tokens": "different"},
}
#: Columns of a published table, see :func:`publish`.
COLUMNS = (
    *("run", "training_seed", "blocks", "planted", "text", "minutes", "spelled"),
    *("search", "layers", "number", "of", "share"),
    *("cost", "found", "false", "strongest", *PARTS),
)
#: Values for each layer in the log of a training, and values of the whole model.
BY_LAYER = ("target", "exact_layers")
WHOLE = ("exact", "plain_target", "all_layers", "exact_all_layers")


def publish(name: str, runs: Sequence[Path], n: int, seed: int = 42, *, progress: bool = False) -> pd.DataFrame:
    """Search the layers of every run of miniature ``name``, on ``n`` pairs of its world, and publish the results.

    ``runs`` are the folders that ``textloc train NAME --ship`` wrote. Returns the table
    ``results/trainings_NAME.csv``, with one row per run and search. If a run has planted layers, all searches are done,
    and otherwise only the exhaustive one. The columns are:

    - run: the name of the folder
    - training_seed
    - blocks: the number of blocks (0: the recipe's own number)
    - planted: the planted layers (empty if there are none)
    - text: "letters", or one of ``miniatures.encoders.TEXTS``
    - minutes: the time of the training steps
    - spelled: the share of test words that were spelled when the run was shipped, with everything named
    - search, layers, number: the search, its set of layers, and the number of these layers
    - of: the number of all text layers
    - share: the set's share of the parameters
    - cost: row evaluations, as a share of the exhaustive search's
    - found, false: the number of planted layers in the set, and the number of its other layers
    - strongest: the number of planted layers among equally many of the strongest layers in the search's order
    - PARTS: after the exhaustive search, how often each part of the set writes the target on ``n`` reported pairs

    The second table, ``results/trainings_NAME_log.csv``, has the evaluations of each training: run, samples, layer
    (-1: the whole model), WHOLE, BY_LAYER.

    Raises TextlocError for a folder without a miniature, for a folder of another model, and for two folders with the
    same name.
    """
    logs = {Path(folder).name: training_log_of(name, Path(folder)) for folder in runs}
    if len(logs) < len(runs) or not runs:
        raise TextlocError(f"runs need different names, got {', '.join(Path(folder).name for folder in runs)}")
    rows, seconds, weights = [], 0.0, []
    for folder in runs:
        model = load(name, model_path=str(folder))
        experiment = Experiment.of(model, progress=progress)
        spent = Spent(experiment.store)
        about = _about(Path(folder).name, logs[Path(folder).name], model)
        planted = [int(layer) for layer in about["planted"].split()]
        sets = _search(experiment, n, seed, all_of_them=bool(planted))
        for how, found in sets.items():
            row = about | {"search": how, "layers": joined(found.layers), "number": len(found.layers)}
            row["of"] = len(model.layers)
            row |= {"share": found.share, "cost": found.row_evaluations / sets["exhaustive"].row_evaluations}
            hits = len(set(planted) & set(found.layers)) if planted else 0
            row |= {"found": hits, "false": len(found.layers) - hits if planted else 0}
            row |= {"strongest": localization.among_strongest(found, planted)}
            rows.append(row | (_parts(experiment, found, n, seed) if how == "exhaustive" else {}))
        seconds += spent.seconds
        weights.append(fingerprint(model))
    told = {"pairs": n, "seed": seed, "key": {"weights": weights}}
    table = pd.DataFrame(rows, columns=COLUMNS)
    experiment.write(f"trainings_{name}", table, seconds=round(seconds, 1), **told)
    experiment.write(f"trainings_{name}_log", _log_table(logs), seconds=0.0, **told)  # copied from the logs
    return table


def published(model: Model) -> pd.DataFrame | None:
    """The table of :func:`publish` for this model's name. None if there is no published table."""
    return _published(f"trainings_{model.spec.name}")


def together(names: Iterable[str]) -> pd.DataFrame:
    """The published tables of several models in one table, with model as its first column. It may have no rows."""
    tables = {name: table for name in names if (table := _published(f"trainings_{name}")) is not None}
    if not tables:
        return pd.DataFrame(columns=["model", *COLUMNS])
    return pd.concat(tables, names=["model"]).reset_index("model")


def evaluations(model: Model) -> dict[str, pd.DataFrame]:
    """Map each run to its evaluations during the training. Empty if none are published.

    Columns samples, WHOLE, and best_layer: the target letters that the strongest single layer of this evaluation wrote.
    """
    log = _published(f"trainings_{model.spec.name}_log")
    if log is None:
        return {}
    found = {}
    for run, rows in log.groupby("run", sort=False):
        best = rows[rows.layer >= 0].groupby("samples").target.max()
        whole = rows[rows.layer == -1].dropna(axis=1, how="all")
        found[run] = whole.assign(best_layer=whole.samples.map(best))
    return found


def _published(name: str) -> pd.DataFrame | None:
    try:
        return published_store().load_published(name)
    except NotPublishedError:
        return None


def _search(experiment: Experiment, n: int, seed: int, *, all_of_them: bool) -> dict[str, Found]:
    if all_of_them:
        return specificity.searches(experiment, n, seed)
    pairs = scene_pairs.for_model(experiment.model, n, "select", seed)
    return {"exhaustive": localization.localize(experiment, pairs, how="exhaustive", by="exact")}


def _parts(experiment: Experiment, found: Found, n: int, seed: int) -> dict[str, float]:
    pairs = scene_pairs.for_model(experiment.model, n, "report", seed, same_length=True)
    sites = [Site(kind=part, layers=found.layers, **how) for part, how in PARTS.items()]
    table = sweeps.table(experiment, pairs, sites, source=False)
    return {part: float(table.exact[table.kind == part].mean()) for part in PARTS}


def _about(run: str, log: dict, model: Model) -> dict:
    report = log["report"]
    about = {"run": run, "training_seed": report["seed"], "blocks": report["layers"] or 0}
    about |= {"planted": joined(report["seeing"] or ()), "text": report.get("text") or "letters"}
    about |= {"minutes": round(report["seconds"] / 60, 1)}
    return about | {"spelled": (model.spec.trained or {})["test"]["exact"]["mean"]}


def _log_table(logs: dict[str, dict]) -> pd.DataFrame:
    rows = []
    for run, log in logs.items():
        for each in log["evaluations"]:
            at = {"run": run, "samples": each["samples"]}
            rows.append(at | {"layer": -1} | {key: each.get(key) for key in WHOLE})
            for layer in range(len(each.get("target", ()))):
                rows.append(at | {"layer": layer} | {key: each[key][layer] for key in BY_LAYER})
    return pd.DataFrame(rows, columns=["run", "samples", "layer", *WHOLE, *BY_LAYER])


def training_log_of(name: str, folder: Path) -> dict:
    """Read the training log of a miniature that ``textloc train --ship`` wrote."""
    path = folder / "training.json"
    try:
        log = json.loads(path.read_text())
        known = log["report"]["name"]
    except OSError:
        raise TextlocError(f"{folder} holds no miniature; textloc train {name} --ship {folder} writes one") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise TextlocError(f"{path} is corrupt; restore it, or train the miniature again") from None
    if known != name:
        raise TextlocError(f"{folder} holds {known}, not {name}")
    return log
