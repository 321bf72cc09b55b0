"""Whether the same miniature, trained from other seeds, keeps its text in the same layers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from textloc_utils import sweeps
from textloc_utils.experiment import Experiment, Spent, fingerprint, published_table
from textloc_utils.localization import localize
from textloc_utils.models import Model, load, training_log
from textloc_utils.prompts import make_pairs
from textloc_utils.settings import TextlocError
from textloc_utils.sites import joined
from textloc_utils.trainings import training_log_of


def publish(name: str, runs: Sequence[Path], n: int, seed: int = 42, *, progress: bool = False) -> pd.DataFrame:
    """Search the layers of a miniature trained again from other seeds exhaustively, and publish what came out.

    ``runs`` are the folders that ``textloc train --ship`` wrote; the miniature that comes with the package is searched
    beside them, over the same ``n`` pairs. Written to the package's data and returned: ``results/seeds_NAME.csv``, one
    row per training seed and layer with columns training_seed, samples and characters (the training's end), layer,
    mean, low, high (text effect of the layer alone, 95 % interval), chosen (of the localized set), share (of the
    denoiser's parameters), score and reached (of the set, see ``localization.Found``). Beside it
    ``results/seeds_NAME_training.csv``, one row per training seed, evaluation and layer: training_seed, samples,
    characters, layer, target.

    Raises TextlocError for a folder without a miniature, one of another model, and two from one training seed.
    """
    pairs = make_pairs(n, seed)
    shipped = load(name)
    known = training_log(shipped.spec)
    if known is None:
        raise TextlocError(f"{name} is no miniature with a training log")
    trained = {None: known} | {folder: training_log_of(name, folder) for folder in runs}
    seeds = [log["report"]["seed"] for log in trained.values()]
    if len(set(seeds)) < len(seeds):
        raise TextlocError(
            f"every run must have a training seed of its own, got {seeds} (the first is the shipped one's)"
        )
    rows, logs, seconds = [], [], 0.0
    for folder, log in trained.items():
        model = load(name, model_path=str(folder)) if folder else shipped
        experiment = Experiment.of(model, progress=progress)
        spent = Spent(experiment.store)
        found = localize(experiment, pairs, how="exhaustive")
        effects = sweeps.effect_intervals(sweeps.table(experiment, pairs))
        seconds += spent.seconds
        effects = effects[effects.kind == "layer"].assign(layer=lambda alone: alone.layers.astype(int))
        about = {"training_seed": log["report"]["seed"]}
        end = log["evaluations"][-1]
        rows += [
            about
            | {"samples": end["samples"], "characters": end["characters"], **effect}
            | {"chosen": effect["layer"] in found.layers, "share": found.share}
            | {"score": found.score and found.score.mean, "reached": found.reached.mean}
            for effect in effects[["layer", "mean", "low", "high"]].to_dict("records")
        ]
        logs += [
            about | {"samples": row["samples"], "characters": row["characters"], "layer": layer, "target": target}
            for row in log["evaluations"]
            for layer, target in enumerate(row["target"])
        ]
    told = {"pairs": n, "seed": seed, "training_seeds": seeds, "key": {"weights": fingerprint(shipped)}}
    table, experiment = pd.DataFrame(rows), Experiment.of(shipped)
    experiment.write(f"seeds_{name}", table, seconds=round(seconds, 1), **told)
    experiment.write(f"seeds_{name}_training", pd.DataFrame(logs), seconds=0.0, **told)  # copied from the logs
    return table


def published(model: Model) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """What :func:`publish` published for this very model, None if nothing: its table, and a short one.

    The short one has one row per training seed: training_seed, layers (of the set, joined by spaces), share, score,
    reached and characters, as there, and ``appeared``, the samples after which a layer alone wrote (see
    :func:`appeared`).
    """
    names = (f"seeds_{model.spec.name}", f"seeds_{model.spec.name}_training")
    table, training = (published_table(model, name) for name in names)
    if table is None or training is None:
        return None
    rows = []
    for seed, part in table.groupby("training_seed", sort=False):
        log = training[training.training_seed == seed].groupby("samples").target.agg(list).reset_index()
        about = part.iloc[0][["share", "score", "reached", "characters"]]
        layers = joined(part.layer[part.chosen])
        rows.append({"training_seed": seed, "layers": layers, **about, "appeared": appeared(log)["samples"]})
    return table, pd.DataFrame(rows)


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
