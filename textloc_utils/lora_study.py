"""Adapters on the localized layers against fair controls, on a task that no miniature was trained on.

The **new task** is a word of seven letters on a banner; the **old** one is what the model could do before: words of
three to six letters on a sign. Every arm sees the same scenes in the same order and trains the same number of steps,
and is compared twice: at equal rank, and at equal trainable parameters (as many as all text layers have at rank 2).
Learning rate, ranks and steps were chosen on random strings of training, never on the words that are reported.
"""

import functools
import hashlib
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from textloc_utils import lora, lora_looks, metrics, models, ocr, prompts
from textloc_utils.experiment import Experiment
from textloc_utils.lora import Training
from textloc_utils.lora_looks import BEFORE, diversity
from textloc_utils.miniatures import scenes
from textloc_utils.models import Model
from textloc_utils.settings import TextlocError

ROWS = 1  #: part of a stored unit's key: raised whenever its rows change
SEEDS = (0, 1, 2)
SCENES = 1024  #: of the new task, drawn once for all arms
REFERENCE_RANK = 2  #: of all text layers, whose number of parameters every arm gets where these are equal
KIN = (8, 6)  #: prompts that leave the colours open, and pictures of each, for the diversity
ROUNDS, ROUND_STEPS = 4, 4  #: how a step's time is taken, see :func:`seconds_per_step`


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One training run to compare: its name, what is ``equal`` between the arms, and its settings."""

    name: str
    equal: str
    training: Training


def drawn_scenes(n: int, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """``n`` pictures of the new task, uint8 (n, H, W, 3), and their captions; no held-out word is among them."""
    rng = random.Random(f"long scenes {seed}")
    made = [scenes.long_scene(rng) for _ in range(n)]
    return np.stack([scenes.render(scene) for scene, _ in made]), [caption for _, caption in made]


def shared(steps: int | None = None) -> Training:
    """What all arms share, before their layers are chosen; ``steps`` are a preset's, where it asks for few."""
    return Training(layers=()) if steps is None else Training(layers=(), steps=steps)


def arms(model: Model, layers: Sequence[int], seed: int, training: Training) -> list[Arm]:
    """The runs of one seed, for the localized ``layers``; ``training`` holds what they share."""
    sets = lora_looks.arms(model, layers, replace(training, seed=seed))
    count = lora.parameters(model, replace(sets[lora_looks.EVERY], rank=REFERENCE_RANK))
    same_rank = [Arm(name=name, equal="rank", training=each) for name, each in sets.items()]
    return same_rank + [
        Arm(name=name, equal="parameters", training=lora.with_parameters(model, each, count))
        for name, each in sets.items()
    ]


# --- what a model can do -------------------------------------------------------------------------------------


def measure(experiment: Experiment, n: int, seed: int = 42) -> dict:
    """Scores of the experiment's model as it is, over ``n`` held-out words of each task.

    Keys, each for ``new`` and ``old``: ``_scores`` (the text scores in the order of the prompts, joined by spaces),
    ``_score``, ``_exact``, ``_cer`` and ``_f1`` (means); and ``diversity``, see ``lora_looks.diversity``.
    """
    out: dict[str, object] = {}
    for task, todo in (("new", prompts.long_prompts(n, seed)), ("old", prompts.spelling_prompts(n, seed))):
        made = experiment.draw([p for p, _, _ in todo], [s for _, _, s in todo])
        read = list(zip(ocr.read(made.images), (word for _, word, _ in todo), strict=True))
        scores = [metrics.text_score(*each) for each in read]
        out |= {
            f"{task}_score": float(np.mean(scores)),
            f"{task}_exact": float(np.mean([metrics.exact_match(*each) for each in read])),
            f"{task}_cer": float(np.mean([metrics.character_error_rate(*each) for each in read])),
            f"{task}_f1": float(np.mean([metrics.character_scores(*each)[2] for each in read])),
            f"{task}_scores": " ".join(f"{score:.4f}" for score in scores),
        }
    words = [word for _, word, _ in prompts.spelling_prompts(KIN[0], seed)]
    asked = [prompts.SIMPLE_TEMPLATE.format(text=word) for word in words for _ in range(KIN[1])]
    made = experiment.draw(asked, [seed + i for i in range(KIN[1])] * KIN[0])
    return out | {"diversity": diversity(made.images.reshape(*KIN, *made.images.shape[1:]))}


def evaluate(experiment: Experiment, folder: str | os.PathLike, n: int, seed: int = 42) -> pd.DataFrame:
    """:func:`measure` without and with the adapter saved in ``folder``, two rows; kept in the store."""
    file = Path(folder) / lora.FILE
    prompts.long_prompts(n, seed)
    ocr.tesseract_version()
    inputs = _inputs(experiment, n, seed)

    def unit(adapter: str | None) -> pd.DataFrame:
        return experiment.unit("lora", inputs | {"adapter": adapter}, lambda: [measure(experiment, n, seed)])

    lora.load(experiment.model, folder)
    try:
        after = unit(hashlib.sha256(file.read_bytes()).hexdigest())
    finally:
        lora.remove(experiment.model)
    return pd.concat([unit(None).assign(arm=BEFORE), after.assign(arm="after")], ignore_index=True)


def _inputs(experiment: Experiment, n: int, seed: int) -> dict:
    """What every unit hangs on; taken while the model carries no adapter."""
    return experiment.key | {"rows": ROWS, "kin": KIN, "n": n, "seed": seed}


# --- the table -----------------------------------------------------------------------------------------------


def study(
    experiment: Experiment,
    layers: Sequence[int],
    n: int,
    seed: int = 42,
    *,
    training: Training | None = None,
    seeds: Sequence[int] = SEEDS,
) -> pd.DataFrame:
    """Train and measure every arm for the localized ``layers``; one row per (arm, equality, training seed).

    ``n`` held-out words of each task are drawn by ``seed``; ``training`` is what the arms share (default:
    :func:`shared`). Columns as :func:`measure`, and model, arm, equal, seed, layers, rank, parameters, seconds_per_step
    (see :func:`seconds_per_step`), saved_bytes, peak_bytes (0 on the CPU) and losses (per step, joined by spaces). The
    first row is the model without adapters. Runs are kept one by one in the store; published as
    ``results/lora_MODEL.csv``, see ``experiment.Experiment.table``.
    """
    model = experiment.model
    if not layers:
        raise TextlocError("the study needs at least one localized layer")
    models.check_layers(model, layers)
    training = shared() if training is None else training
    todo = [arm for at in seeds for arm in arms(model, layers, at, training)]
    inputs = _inputs(experiment, n, seed)

    def make() -> pd.DataFrame:
        prompts.long_prompts(n, seed)
        ocr.tesseract_version()
        data = lora.prepare(model, *drawn_scenes(SCENES))
        before = experiment.unit("lora", inputs | {"adapter": None}, lambda: [measure(experiment, n, seed)])
        rows = [before.assign(**_row(model))]
        for arm in tqdm(todo, desc=f"{experiment.name}: arms", unit="run", disable=not experiment.progress):
            about = inputs | {"scenes": SCENES, "training": arm.training}  # once for both comparisons
            row = experiment.unit("lora", about, functools.partial(_run, experiment, data, arm, n, seed))
            rows.append(row.assign(arm=arm.name, equal=arm.equal))
        taken = seconds_per_step(model, data, [arm.training for arm in todo])
        rows[1:] = [row.assign(seconds_per_step=each) for row, each in zip(rows[1:], taken, strict=True)]
        return pd.concat(rows, ignore_index=True)[list(rows[-1])]

    return experiment.table(f"lora_{experiment.name}", inputs | {"scenes": SCENES, "arms": todo}, make)


def seconds_per_step(model: Model, data: lora.Data, trainings: Sequence[Training]) -> list[float]:
    """Time of a training step of each, medians over rounds in which all take turns.

    So what else the machine does slows all alike, and ratios hold; the first round warms up.
    """
    kinds = [replace(training, seed=0, steps=min(ROUND_STEPS, training.steps)) for training in trainings]
    seconds: dict[Training, list[float]] = {kind: [] for kind in kinds}
    for _ in range(ROUNDS):
        for kind in seconds:
            seconds[kind].append(lora.train(model, data, kind).seconds_per_step)
            lora.remove(model)
    return [float(np.median(seconds[kind][1:])) for kind in kinds]


def _row(model: Model, arm: Arm | None = None, report: lora.Report | None = None) -> dict:
    """What identifies a run and what it took; zeros for the model without an adapter."""
    return {
        "model": model.spec.name,
        "arm": arm.name if arm else BEFORE,
        "equal": arm.equal if arm else "",
        "seed": arm.training.seed if arm else 0,
        "layers": " ".join(map(str, arm.training.layers)) if arm else "",
        "rank": arm.training.rank if arm else 0,
        "parameters": report.parameters if report else 0,
        "seconds_per_step": report.seconds_per_step if report else 0.0,
        "saved_bytes": report.saved_bytes if report else 0,
        "peak_bytes": (report.peak_bytes or 0) if report else 0,
        "losses": " ".join(f"{loss:.5f}" for loss in report.losses) if report else "",
    }


def _run(experiment: Experiment, data: lora.Data, arm: Arm, n: int, seed: int) -> list[dict]:
    report = lora.train(experiment.model, data, arm.training)
    try:
        return [_row(experiment.model, arm, report) | measure(experiment, n, seed)]
    finally:
        lora.remove(experiment.model)


# --- short tables ---------------------------------------------------------------------------------------------


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """One row per arm and comparison of :func:`study`'s table, means over training seeds.

    Columns arm, equal, layers (those of all seeds), rank, parameters, seconds_per_step, saved_bytes, new_exact,
    old_exact, ``new`` and ``old`` (mean text score) and diversity, these three with ``_low`` and ``_high``. The scores'
    95 % intervals draw training seeds and words anew, both with replacement. The diversity's is Student's, over the
    training seeds: it holds for the prompts that were drawn, and there is none of a single training.
    """
    rows = []
    for (arm, equal), part in table.groupby(["arm", "equal"], sort=False):
        means = part[["rank", "parameters", "seconds_per_step", "saved_bytes", "new_exact", "old_exact", "diversity"]]
        row = {"arm": arm, "equal": equal, "layers": ", ".join(dict.fromkeys(part.layers)), **means.mean()}
        for task in ("new", "old"):
            row |= _interval(task, _scores(part, task))
        spread = metrics.student(part.diversity)
        row |= {"diversity_low": spread.low, "diversity_high": spread.high}
        rows.append(row | {"seeds": len(part)})
    return pd.DataFrame(rows)


def advantages(table: pd.DataFrame) -> pd.DataFrame:
    """Text score of the localized arm less each other arm's, on the same words and training seeds.

    Columns arm, equal, ``new`` and ``old``, each with ``_low`` and ``_high`` as :func:`summarise`.
    """
    rows = []
    for equal, part in table[table.arm != BEFORE].groupby("equal", sort=False):
        arm = dict(list(part.groupby("arm", sort=False)))
        for name in arm.keys() - {"localized"}:
            row = {"arm": name, "equal": equal}
            for task in ("new", "old"):
                row |= _interval(task, _scores(arm["localized"], task) - _scores(arm[name], task))
            rows.append(row)
    return pd.DataFrame(rows).sort_values(["equal", "arm"], ascending=[False, True], ignore_index=True)


def curves(table: pd.DataFrame, window: int = 10) -> pd.DataFrame:
    """Training loss by step: columns arm, equal, step, loss, the mean over training seeds and ``window`` steps."""
    rows = []
    for (arm, equal), part in table[table.arm != BEFORE].groupby(["arm", "equal"], sort=False):
        losses = pd.DataFrame([[float(loss) for loss in text.split()] for text in part.losses]).mean()
        smooth = losses.rolling(window, min_periods=1).mean()
        rows += [{"arm": arm, "equal": equal, "step": at + 1, "loss": loss} for at, loss in enumerate(smooth)]
    return pd.DataFrame(rows)


def _scores(part: pd.DataFrame, task: str) -> np.ndarray:
    """Text scores (training seeds, words)."""
    return np.array([[float(score) for score in text.split()] for text in part.sort_values("seed")[f"{task}_scores"]])


def _interval(name: str, scores: np.ndarray) -> dict:
    """Mean and 95 % interval of scores (training seeds, words) under a name; scipy resamples one of the two only."""
    rng, resamples = np.random.default_rng(0), metrics.RESAMPLES
    seeds, words = (rng.integers(size, size=(resamples, size)) for size in scores.shape)
    low, high = metrics.percentiles([scores[np.ix_(*rows)].mean() for rows in zip(seeds, words, strict=True)])
    return {name: scores.mean(), f"{name}_low": low, f"{name}_high": high}
