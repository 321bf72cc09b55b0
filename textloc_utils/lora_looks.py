"""Adapters tuned on scenes of one look, from a miniature's early checkpoint: the gain in spelling, and the drift.

The base is an early checkpoint of the denoiser, which spells about seven words in ten (``MINIATURE/early``). It is
tuned on scenes with one typeface in front of one material (LOOK). Their captions name neither, so an adapter can learn
that all pictures look like this. Test words then measure how much better it spells, in prompts that name another look
and in prompts that name nothing. The looks of the pictures of the latter prompts show the drift. Each arm has its own
learning rate, which is chosen on validation words.
"""

import functools
import hashlib
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm.auto import tqdm

from textloc_utils import lora, metrics, models, ocr, prompts, scene_pairs, sites
from textloc_utils.experiment import Experiment, fingerprint
from textloc_utils.lora import Training
from textloc_utils.miniatures import evaluation, factors, world
from textloc_utils.models import Model
from textloc_utils.settings import TextlocError

ROWS = 1  #: part of a stored unit's key: raise it whenever the rows of a unit change
BEFORE = "before"  #: the row of the model without an adapter
LOCALIZED, EVERY = "localized", "all text layers"
SCENES, STEPS = 4000, 200  #: number of scenes of the look, drawn once for all arms, and number of steps of a training
RATES = (5e-4, 2e-3, 8e-3)  #: the learning rates from which each arm's rate is chosen
SEEDS, TUNED = (0, 1, 2, 3, 4), 100  #: seeds of the reported trainings, and of the trainings that choose the rates
TUNING = 64  #: largest number of validation words that choose a rate; fewer are used if fewer words are reported
MARGIN = 0.02  #: gains in the exact rate that differ by less than this count as equal, see ``data/claims.toml``
LOOK = replace(
    world.SECOND,
    name="one look",
    typefaces=("serif",),
    materials=("brick",),
    named=world.SECOND.named | {"typeface": 0.0, "material": 0.0},
)
#: The looks that test prompts name. They have no typeface and no material of LOOK.
OTHERS = replace(
    world.SECOND,
    name="other looks",
    typefaces=tuple(face for face in world.TYPEFACES if face not in LOOK.typefaces),
    materials=tuple(material for material in world.MATERIALS if material not in LOOK.materials),
)


def early(model: Model) -> Model:
    """Load the early checkpoint of a miniature. Raises TextlocError if the miniature's folder has none."""
    file = Path(model.spec.source) / "early" / "denoiser.safetensors"
    if not (model.spec.miniature and file.is_file()):
        raise TextlocError(
            f"{model.spec.name} has no early checkpoint ({file}); textloc train writes one for a miniature"
        )
    found = models.load(model.spec.name, device=str(model.device), model_path=model.spec.source)
    try:
        found.denoiser.load_state_dict({name: value.float() for name, value in load_file(file).items()})
    except (OSError, SafetensorError, RuntimeError):
        raise TextlocError(f"{file} is damaged or of another model; restore it, or train the miniature again") from None
    return replace(found, spec=model.spec)


def strongest_early(model: Model, n: int) -> tuple[int, ...]:
    """The ``n`` text layers that wrote most letters alone at the early checkpoint, by the log of the training.

    Empty where the log does not tell.
    """
    log, told = models.training_log(model.spec), (model.spec.trained or {}).get("early")
    if log is None or told is None:
        return ()
    at = [each["target"] for each in log["evaluations"] if each["samples"] == told["samples"]]
    return (
        tuple(sorted(int(layer) for layer in np.argsort(-np.array(at[0]), kind="stable")[:n])) if at and at[0] else ()
    )


def shared(steps: int | None = None) -> Training:
    """The settings that all arms share, still without layers. ``steps`` is the number of a preset with few steps."""
    return Training(layers=(), steps=steps or STEPS)


def drawn_scenes(n: int, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """``n`` pictures of LOOK, uint8 (n, H, W, 3), and their captions. They show training words and random strings."""
    rng = random.Random(f"one look {seed}")
    known = [world.random_scene(rng, LOOK) for _ in range(n)]
    return np.stack([world.render(scene) for scene in known]), [world.caption(scene, rng, LOOK) for scene in known]


def arms(model: Model, layers: Sequence[int], training: Training) -> dict[str, Training]:
    """The trainings to compare, by name, for the localized ``layers``. ``training`` holds their common settings.

    Every training seed draws different random layers. A model without separate self-attention of the picture (joint
    attention) has no arm "all attention", because all its attention layers are text layers.
    """
    every = tuple(range(len(model.layers)))
    found = {
        LOCALIZED: replace(training, layers=tuple(sorted(layers))),
        EVERY: replace(training, layers=every),
        "random layers": replace(training, layers=sites.random_layers(model, layers, training.seed)),
    }
    if models.self_attention(model.denoiser):
        found["all attention"] = replace(training, layers=every, self_attention=True)
    return found


def diversity(pictures: np.ndarray) -> float:
    """Mean distance between two pictures of the same group, for pictures (groups, pictures, H, W, 3).

    The distance is the root mean squared difference, in grey levels.
    """
    left, right = np.triu_indices(pictures.shape[1], k=1)
    each = [np.sqrt(metrics.mse(kin[left], kin[right])) for kin in pictures]
    return float(np.mean(each))


# --- the tables -----------------------------------------------------------------------------------------------


def asked_words(use: str, n: int, seed: int) -> list[str]:
    """``n`` words of one of ``scene_pairs.USES``, drawn with ``seed``."""
    pool = scene_pairs.words(use)
    if not 4 <= n <= len(pool):
        raise TextlocError(f"the number of words must be from 4 to {len(pool)}, got {n}")
    return random.Random(f"{use} {seed}").sample(pool, n)


def measure(experiment: Experiment, words: Sequence[str], seed: int) -> dict:
    """Draw pictures of ``words`` with the experiment's model, and measure them.

    The first half of the words is in prompts that name everything, with looks other than LOOK. The second half is in
    prompts that name nothing (open prompts). The keys are words (their number), exact (share of all pictures that spell
    their word), named and open (the same share in each half), and diversity (of pairs of the open prompts' pictures,
    see :func:`diversity`). For a miniature there are three more keys: obeyed (share of named prompts whose picture has
    the named typeface and material), and typefaces and materials (how often each one is read in the open prompts'
    pictures, in the world's order, joined by spaces).
    """
    half, small = len(words) // 2, scene_pairs.world_of(experiment.model) is not None
    shown = evaluation.scenes(list(words), seed, OTHERS)
    if small:
        asked = [evaluation.named(s) if i < half else world.prompt(s.text, world.OPEN) for i, s in enumerate(shown)]
    else:
        templates = [prompts.TEMPLATE] * half + [prompts.SIMPLE_TEMPLATE] * (len(words) - half)
        asked = [t.format(text=s.text, sign=s.sign, wall="blue") for t, s in zip(templates, shown, strict=True)]
    pictures = experiment.draw(asked, [seed + i for i in range(len(asked))]).images
    exact = [metrics.exact_match(*each) for each in zip(ocr.read(pictures), words, strict=True)]
    pairs = (len(words) - half) // 2
    found = {
        "words": len(words),
        "exact": float(np.mean(exact)),
        "named": float(np.mean(exact[:half])),
        "open": float(np.mean(exact[half:])),
        "diversity": diversity(pictures[half : half + 2 * pairs].reshape(pairs, 2, *pictures.shape[1:])),
    }
    return found | (_looks(pictures, shown, half) if small else {})


def _looks(pictures: np.ndarray, shown: Sequence[world.Scene], half: int) -> dict:
    seen = factors.read(pictures)
    obeyed = [(r.typeface, r.material) == (s.typeface, s.material) for r, s in zip(seen[:half], shown, strict=False)]
    faces, materials = [r.typeface for r in seen[half:]], [r.material for r in seen[half:]]
    return {
        "obeyed": float(np.mean(obeyed)),
        "typefaces": " ".join(str(faces.count(name)) for name in world.TYPEFACES),
        "materials": " ".join(str(materials.count(name)) for name in world.MATERIALS),
    }


def evaluate(experiment: Experiment, folder: str | os.PathLike, n: int, seed: int = 42) -> pd.DataFrame:
    """:func:`measure` on ``n`` test words without and with the adapter saved in ``folder``, kept in the store.

    There are two rows, for the arms BEFORE and "after".
    """
    words = asked_words("report", n, seed)
    inputs = experiment.key | {"rows": ROWS, "words": words, "seed": seed}

    def unit(adapter: str | None) -> pd.DataFrame:
        return experiment.unit("lora", inputs | {"adapter": adapter}, lambda: [measure(experiment, words, seed)])

    lora.load(experiment.model, folder)
    try:
        after = unit(hashlib.sha256((Path(folder) / lora.FILE).read_bytes()).hexdigest())
    finally:
        lora.remove(experiment.model)
    return pd.concat([unit(None).assign(arm=BEFORE), after.assign(arm="after")], ignore_index=True)


def study(
    experiment: Experiment,
    layers: Sequence[int],
    n: int,
    seed: int = 42,
    *,
    training: Training | None = None,
    seeds: Sequence[int] = SEEDS,
) -> pd.DataFrame:
    """Train every arm from the early checkpoint and measure it on ``n`` test words, for the localized ``layers``.

    There is one row for the early checkpoint, and one per training seed and arm. Columns: model, arm, lr, seed, layers,
    rank, parameters, seconds_per_step, and the keys of :func:`measure`. ``training`` holds the common settings of the
    arms (default: :func:`shared`). Each arm's learning rate is the one of RATES with the highest exact rate on TUNING
    validation words. Of equal rates, the smaller one is taken. Each run is kept in the store. The table is published as
    ``results/lora_MODEL_looks.csv``, and the table that chose the learning rates as ``results/lora_MODEL_rates.csv``.
    Both belong to the weights of the finished miniature.
    """
    if not layers:
        raise TextlocError("the study needs at least one localized layer")
    models.check_layers(experiment.model, layers)
    asked = {"tune": asked_words("tune", min(TUNING, n), seed), "report": asked_words("report", n, seed)}
    base = replace(experiment, model=early(experiment.model))
    start = training or shared()
    scenes = min(SCENES, start.steps * start.batch)
    inputs = {"rows": ROWS, "early": fingerprint(base.model), "look": LOOK, "scenes": scenes, "seed": seed}
    whole = base.key | inputs
    data = functools.cache(lambda: lora.prepare(base.model, *drawn_scenes(scenes)))

    def table(name: str, use: str, todo: Sequence[tuple[str, Training | None]]) -> pd.DataFrame:
        def unit(arm: str, training: Training | None) -> pd.DataFrame:
            about = whole | {"words": asked[use], "training": training}
            row = base.unit("looks", about, lambda: [_run(base, data, training, asked[use], seed)])
            row.insert(1, "arm", arm)
            return row

        def make() -> pd.DataFrame:
            bar = tqdm(todo, desc=f"{base.name}: {name}", unit="run", disable=not base.progress)
            return pd.concat([unit(*each) for each in bar], ignore_index=True)

        return experiment.table(f"lora_{base.name}_{name}", inputs | {"words": asked[use], "arms": todo}, make)

    tried = arms(base.model, layers, replace(start, seed=TUNED))
    known = table("rates", "tune", [(arm, replace(each, lr=lr)) for arm, each in tried.items() for lr in RATES])
    rates = best_rates(known)
    todo = [arms(base.model, layers, replace(start, seed=at)).items() for at in seeds]
    chosen = [(arm, replace(each, lr=rates[arm])) for of in todo for arm, each in of]
    return table("looks", "report", [(BEFORE, None), *chosen])


def _run(
    experiment: Experiment,
    data: Callable[[], lora.Data],
    training: Training | None,
    words: Sequence[str],
    seed: int,
) -> dict:
    """One row of :func:`study`, without its arm. ``data`` is a function that returns the training data."""
    about = {"model": experiment.name, "lr": 0.0, "seed": 0, "layers": "", "rank": 0, "parameters": 0}
    if training is None:
        return about | {"seconds_per_step": 0.0} | measure(experiment, words, seed)
    report = lora.train(experiment.model, data(), training)
    about |= {"lr": training.lr, "seed": training.seed, "layers": " ".join(map(str, training.layers))}
    about |= {"rank": training.rank, "parameters": report.parameters, "seconds_per_step": report.seconds_per_step}
    try:
        return about | measure(experiment, words, seed)
    finally:
        lora.remove(experiment.model)


def best_rates(table: pd.DataFrame) -> dict[str, float]:
    """Each arm's learning rate with the highest exact rate in the table. Of equal ones, the smaller is taken."""
    ordered = table.sort_values(["exact", "lr"], ascending=[False, True])
    return {str(arm): float(part.lr.iloc[0]) for arm, part in ordered.groupby("arm", sort=False)}


# --- results from the table -----------------------------------------------------------------------------------

#: Columns of :func:`changes`: gains in exact rates, then drifts.
GAINS, DRIFTS = ("gain", "named_gain", "open_gain"), ("typefaces", "materials", "diversity", "obeyed")


def changes(table: pd.DataFrame) -> pd.DataFrame:
    """The changes by each training of :func:`study`'s table. Columns: arm, seed, GAINS and DRIFTS.

    Gains are exact rates minus those before the training. There are four drifts. All except the last are measured on
    open prompts. typefaces: the change of the entropy of their shares, in bits. materials: the total variation distance
    between their shares and those before. diversity: the relative loss. obeyed: the loss. A loss is below 0 if the
    value rose.
    """
    first, trained = table[table.arm == BEFORE].iloc[0], table[table.arm != BEFORE]
    return pd.DataFrame(
        {
            "arm": trained.arm,
            "seed": trained.seed,
            "gain": trained.exact - first.exact,
            "named_gain": trained.named - first.named,
            "open_gain": trained.open - first.open,
            "typefaces": [abs(_entropy(each) - _entropy(first.typefaces)) for each in trained.typefaces],
            "materials": [np.abs(_shares(each) - _shares(first.materials)).sum() / 2 for each in trained.materials],
            "diversity": 1 - trained.diversity / first.diversity,
            "obeyed": first.obeyed - trained.obeyed,
        }
    )


def _shares(counts: str) -> np.ndarray:
    numbers = np.array([float(number) for number in counts.split()])
    return numbers / max(1.0, numbers.sum())


def _entropy(counts: str) -> float:
    shares = _shares(counts)
    return float(-(shares[shares > 0] * np.log2(shares[shares > 0])).sum())


def plane(table: pd.DataFrame) -> pd.DataFrame:
    """One row per arm of :func:`study`'s table, with means over training seeds.

    Columns: arm, lr, seeds, and each of GAINS and DRIFTS with ``_low`` and ``_high`` (Student's interval over seeds).
    """
    rates = table.groupby("arm").lr.first()
    return pd.DataFrame(
        {"arm": arm, "lr": rates[arm], "seeds": len(part)} | _students(part.set_index("seed"))
        for arm, part in changes(table).groupby("arm", sort=False)
    )


def advantages(table: pd.DataFrame) -> pd.DataFrame:
    """The values of :func:`plane` for the localized layers, minus those of each other arm, paired by training seed.

    Columns: arm, and each of GAINS and DRIFTS with ``_low`` and ``_high``.
    """
    by_arm = {arm: part.set_index("seed") for arm, part in changes(table).groupby("arm", sort=False)}
    names = [*GAINS, *DRIFTS]
    return pd.DataFrame(
        {"arm": arm} | _students(by_arm[LOCALIZED][names] - part[names])
        for arm, part in by_arm.items()
        if arm != LOCALIZED
    )


def _students(part: Mapping) -> dict[str, float]:
    out: dict[str, float] = {}
    for name in (*GAINS, *DRIFTS):
        found = metrics.student(part[name])
        out |= {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
    return out


def writes(table: pd.DataFrame) -> dict:
    """The outcome of the claim "writes" of ``data/claims.toml``, from :func:`study`'s table.

    Keys: outcome (supported, contradicted or undecided), figure (in words) and n.
    """
    less, rows, by = advantages(table).set_index("arm"), plane(table).set_index("arm"), changes(table).set_index("seed")
    own, every, gain = rows.loc[LOCALIZED], less.loc[EVERY], {arm: part.gain for arm, part in by.groupby("arm")}
    half = metrics.student(gain[LOCALIZED] - gain[EVERY] / 2)
    beaten = (less.gain_high < MARGIN) & (less.typefaces_low > 0) & (less.materials_low > 0)
    gentler = every.typefaces_high < 0 and every.materials_high < 0
    if beaten.any() or own.gain_high <= 0 or half.high < 0:
        outcome = "contradicted"
    elif own.gain_low > 0 and every.gain_low > -MARGIN and gentler:
        outcome = "supported"
    else:
        outcome = "undecided"
    figure = f"exact rate {_told(own, 'gain')}, less all text layers' {_told(every, 'gain')}; drift less theirs: "
    figure += f"typefaces {_told(every, 'typefaces')} bits, materials {_told(every, 'materials')}"
    return {"outcome": outcome, "figure": figure, "n": int(table.words.iloc[0])}


def _told(row: pd.Series, name: str) -> str:
    return metrics.span(row[name], row[f"{name}_low"], row[f"{name}_high"], "+.2f")
