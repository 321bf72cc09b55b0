"""Train a miniature from scratch: shared parts, a pool of encoded scenes, and the denoiser.

A recipe is a module with SPEC, TEXT (its text encoders: component names to (kind, seed) of ``encoders.KINDS``),
``pipeline``, ``Objective`` and ``tokenize``. It also has LATENTS (arguments of ``parts.make_autoencoder``) unless it
works on pixels, and BUDGET if its budget differs from the default. A recipe of two stages has a class ``Stage2``, which
is made from stage I's folder and has the same members.

The command is ``textloc train NAME``. It works with one process or several (``accelerate launch``), on CPU or CUDA. It
can be killed and resumed at any point. Every random number depends only on (seed, step, process). So a resumed run uses
the same numbers as an uninterrupted run.
"""

import importlib
import inspect
import json
import math
import random
import shutil
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from textloc_utils import files, results
from textloc_utils.generate import step_generator
from textloc_utils.miniatures import autoencoder, encoders, parts, planted, world
from textloc_utils.miniatures.data import KINDS, Drawn, Pool, encode_scenes
from textloc_utils.miniatures.evaluation import evaluate
from textloc_utils.models import ModelSpec, pick_device
from textloc_utils.settings import PATIENCE, TextlocError, check_writable, quiet_libraries

RECIPES = ("sd3-mini", "sdxl-mini", "if-mini", "ldm-mini")
#: Wanted rate of exact spelling of the early checkpoint, which the chapter on LoRA uses, and its allowed range.
EARLY, EARLY_RANGE = 0.70, (0.65, 0.75)
#: Denoisers whose rate of exact spelling in the evaluations is in this range are kept until ``card.export`` chooses the
#: early checkpoint. The range differs from EARLY_RANGE, because the evaluations' reader misses words that Tesseract
#: reads.
CANDIDATES = (0.1, 0.75)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The budget and the settings of a training run.

    ``autoencoder_steps``, ``encoder_steps`` and ``pool`` (scenes that are encoded once, and half as many easy scenes)
    are for the work before the denoiser's training. ``samples`` is the number of the denoiser's training samples. A
    recipe of two stages divides them between the stages. The learning rate ``lr`` falls linearly over the last share
    ``decay`` of the samples. The EMA weights are evaluated ``evaluations`` times at regular intervals, on ``pairs``
    pairs. While the model learns to spell, they are evaluated DENSE times as often.

    ``curriculum`` lists stages: (share of the samples at which the stage begins, share of texts in runs, whether the
    scenes are easy ones, share of the captions that name everything). A text in runs looks the same everywhere. So a
    model can draw it before it has learned the position of each letter, and it learns the shapes of the letters first.
    Positions and whole words follow quickly. Easy scenes (``world.is_easy``) come first, all typefaces and inks later.
    A factor that few captions name is learned faster if more captions name it for a while.

    In the cells of the letters, the loss has ``text_weight`` times the weight that it has elsewhere. Without this, the
    background dominates the loss: it has most of the area, and no prompt decides its details.
    """

    samples: int = 400_000
    autoencoder_steps: int = 4000
    encoder_steps: int = 600
    pool: int = 61_440
    batch: int = 32
    lr: float = 1.5e-3
    decay: float = 0.4
    ema: float = 0.9995
    evaluations: int = 30
    pairs: int = 8
    checkpoint_seconds: float = 120.0
    curriculum: tuple = ((0.0, 0.9, True, 0.0), (0.1, 0.5, True, 0.0), (0.2, 0.1, True, 0.0), (0.45, 0.1, False, 0.0))
    text_weight: float = 1.0

    def __post_init__(self):
        least = {"samples": 1, "autoencoder_steps": 1, "encoder_steps": 1, "pool": 2, "batch": 1, "pairs": 1}
        for name in (*least, "evaluations"):
            value, low = getattr(self, name), least.get(name, 0)
            if not (isinstance(value, int) and low <= value <= 10**12):
                raise TextlocError(f"{name.replace('_', ' ')} must be a whole number of at least {low}, got {value}")
        for name, high in (("lr", 1.0), ("decay", 1.0), ("ema", 1.0), ("text_weight", 100.0)):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 < value <= high):
                raise TextlocError(f"{name.replace('_', ' ')} must be above 0 and at most {high:g}, got {value}")


DENSE = 3


def recipe(name: str):
    """The recipe module of a miniature."""
    if name not in RECIPES:
        raise TextlocError(f"unknown miniature {name!r}; known miniatures: {', '.join(RECIPES)}")
    return importlib.import_module(f"textloc_utils.miniatures.{name.replace('-', '_')}")


def default_budget(name: str) -> Budget:
    """The default budget of a miniature's recipe."""
    return Budget(**getattr(recipe(name), "BUDGET", {}))


def lr_factor(progress: float, step: int, decay: float, warmup: int = 100) -> float:
    """Linear warm-up over ``warmup`` steps, then constant, then linear decay over the budget's last share ``decay``."""
    return min(1.0, (step + 1) / warmup) * min(1.0, max(0.02, (1 - progress) / decay))


def _part(budget: Budget, share: float, **other) -> Budget:
    return replace(budget, samples=max(1, round(budget.samples * share)), **other)


# --- the work before the denoiser's training -------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The parts of a run: text encoders with their tokenizers by component name, the autoencoder, and their reports."""

    encoders: dict
    tokenizers: dict
    vae: AutoencoderKL | None
    report: dict


def prepare(
    rules,
    folder: Path,
    budget: Budget,
    *,
    seed: int,
    only: world.World,
    cache: Path,
    device: str,
    text: str | None = None,
    log=print,
) -> None:
    """Make the shared parts of a run and its pool, each only once. ``folder`` keeps the pool and the parts' paths."""
    known = {}
    for component, (kind, number) in _texts(rules, text).items():
        place, report = parts.make_encoder(
            kind, folder=cache, steps=budget.encoder_steps, seed=number, device=device, log=log
        )
        known[component] = {"folder": str(place), "report": report}
    if hasattr(rules, "LATENTS"):
        place, report = parts.make_autoencoder(
            **rules.LATENTS, folder=cache, steps=budget.autoencoder_steps, seed=0, device=device, log=log
        )
        known["vae"] = {"folder": str(place), "report": report}
        pool = Pool(folder, only)
        vae = None
        for kind, share in KINDS.items():
            if not pool.path(kind).exists():
                vae = vae or AutoencoderKL.from_pretrained(place).to(device)
                encode_scenes(vae, max(1, round(budget.pool * share)), kind, only, seed, pool.path(kind))
    files.write_json(folder / "parts.json", known)


def _texts(rules, text: str | None) -> dict[str, tuple[str, int]]:
    """The recipe's text encoders, or those of a study: a dict from component to (kind, seed)."""
    return {part: (f"{kind}-{text}" if text else kind, number) for part, (kind, number) in rules.TEXT.items()}


def _prepared(rules, folder: Path, text: str | None = None) -> Prepared:
    known = json.loads((folder / "parts.json").read_text())
    found, texts = {}, _texts(rules, text)
    for component, (kind, _) in texts.items():
        of = encoders.KINDS[kind]
        blank = of.build(of.make_tokenizer())
        found[component] = type(blank).from_pretrained(known[component]["folder"]).eval().requires_grad_(False)
    vae = AutoencoderKL.from_pretrained(known["vae"]["folder"]).eval() if "vae" in known else None
    return Prepared(
        encoders=found,
        tokenizers={component: encoders.KINDS[kind].make_tokenizer() for component, (kind, _) in texts.items()},
        vae=vae,
        report={component: of["report"] for component, of in known.items()},
    )


# --- the run -------------------------------------------------------------------------------------------------


def check_run(folder: Path, inputs: dict) -> None:
    """Raise TextlocError for a folder with another run, before anything is written to it."""
    try:
        before = json.loads((folder / "inputs.json").read_text())
    except FileNotFoundError:
        if folder.is_dir() and any(folder.iterdir()):
            raise TextlocError(
                f"{folder} holds files that are not of a training run; give another folder to --out"
            ) from None
        return
    except (OSError, ValueError):
        raise TextlocError(f"{folder / 'inputs.json'} is damaged; delete {folder} to start the run again") from None
    for key, value in json.loads(json.dumps(inputs)).items():
        if before.get(key) != value:
            raise TextlocError(
                f"{folder} holds a run with {key} {before.get(key)}, not {value}; give another folder to --out"
            )


def train(
    name: str,
    folder: Path,
    *,
    budget: Budget | None = None,
    seed: int = 0,
    only: world.World = world.SECOND,
    layers: int | None = None,
    seeing: tuple[int, ...] | None = None,
    text: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    compiled: bool = False,
    cache: Path | None = None,
    log=print,
) -> dict | None:
    """Train miniature ``name`` in ``folder``, or resume from its checkpoint.

    ``budget`` defaults to the recipe's. ``only`` is the world of the training. ``cache`` is the folder of the parts
    that several runs share. Three arguments are for studies. ``layers`` is the number of blocks, if the recipe allows a
    choice. ``seeing`` are the only text layers that can see the letters (see :mod:`.planted`). ``text`` is one of
    ``encoders.TEXTS``, which replaces the recipe's text encoders. With ``compiled``, torch first compiles the
    denoiser's forward pass. Returns the training report in the main process, and None in all others.

    Evaluations are written to ``folder/evaluations.json``. The finished pipeline is saved to ``folder/pipeline``. All
    evaluated denoisers whose spelling is within CANDIDATES are saved to ``folder/early``. A second stage is trained
    after the first one, in ``folder/stage2``. It is not evaluated separately, and it is saved to
    ``folder/pipeline/stage2``.

    Raises TextlocError before any training for a folder with another run, a device that is not present, or a folder
    that cannot be written.
    """
    quiet_libraries()
    place = pick_device(device)
    rules = recipe(name)
    budget = budget or default_budget(name)
    if not (isinstance(seed, int) and 0 <= seed < 2**31):
        raise TextlocError(f"the seed must be a whole number from 0 to 2147483647, got {seed}")
    if layers is not None and "layers" not in inspect.signature(rules.pipeline).parameters:
        raise TextlocError(f"{name} has a fixed number of layers; it can be chosen only for sd3-mini")
    if text is not None and any(kind not in encoders.KINDS for kind, _ in _texts(rules, text).values()):
        raise TextlocError(f"the text encoders of {name} cannot be {text}; they can be chosen only for sd3-mini")
    if text == "subwords" and seeing:
        raise TextlocError("planted layers need one letter per token; omit seeing, or do not set text to subwords")
    study = {"layers": layers, "seeing": seeing, "text": text}
    inputs = {"name": name, "seed": seed, "world": only.name, **study, **asdict(budget)}
    folder, cache = Path(folder), Path(cache or parts.default_folder())
    for each in (folder, cache):
        check_writable(each)
    check_run(folder, {k: v for k, v in inputs.items() if k != "checkpoint_seconds"})
    if precision == "auto":
        precision = "bf16" if autoencoder.has_bf16(place) else "fp32"
    accelerator = Accelerator(
        cpu=place.type == "cpu",
        mixed_precision="no" if precision == "fp32" else precision,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],  # the main process prepares the data alone
    )
    main = accelerator.is_main_process
    if main:
        files.write_json(folder / "inputs.json", inputs)
        prepare(
            rules, folder, budget, seed=seed, only=only, cache=cache, device=str(accelerator.device), text=text, log=log
        )
    accelerator.wait_for_everyone()
    how = {"seed": seed, "only": only, "precision": precision, "compiled": compiled, "log": log}
    built = {} if layers is None else {"layers": layers}
    ready = _prepared(rules, folder, text)
    second = getattr(rules, "Stage2", None)
    part = _part(budget, 1 - second.SHARE) if second else budget
    report = _Run(name, rules, folder, part, ready, accelerator, built=built, seeing=seeing, **how).run()
    if second:
        rules, part = second(folder / "pipeline"), _part(budget, second.SHARE, evaluations=0)
        again = _Run(name, rules, folder / "stage2", part, ready, accelerator, **how).run()
        if main:
            report["stage2"] = again
            shutil.copytree(folder / "stage2" / "pipeline", folder / "pipeline" / "stage2", dirs_exist_ok=True)
    if main:
        report |= {
            "world": only.name,
            **study,
            "parts": ready.report,
            "commit": results.provenance().get("commit"),
        }
        files.write_json(folder / "report.json", report)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return report if main else None


class _Run:
    """The training of one denoiser, from one recipe (a module, or its Stage2)."""

    def __init__(
        self,
        name: str,
        rules,
        folder: Path,
        budget: Budget,
        ready: Prepared,
        accelerator: Accelerator,
        *,
        seed: int,
        only: world.World,
        precision: str,
        compiled: bool,
        log,
        built: dict | None = None,
        seeing: tuple[int, ...] | None = None,
    ):
        self.name, self.rules, self.folder, self.budget = name, rules, folder, budget
        self.accelerator, self.seed, self.only, self.precision, self.log = accelerator, seed, only, precision, log
        self.main, self.cpu = accelerator.is_main_process, accelerator.device.type == "cpu"
        self.latent = ready.vae is not None
        self.spec = ModelSpec(name=name, source=str(folder), miniature=True, **rules.SPEC)
        self.data = Pool(folder, only) if self.latent else Drawn(only)
        torch.manual_seed(seed)
        self.pipe = rules.pipeline(ready, **(built or {}))
        self.pipe.set_progress_bar_config(disable=True)
        if seeing is not None:
            planted.install(self.pipe, self.spec, seeing)
        self.objective = rules.Objective(self.pipe).to(accelerator.device).train()
        learned = [p for p in self.objective.parameters() if p.requires_grad]
        self.learned = learned
        self.optimiser = torch.optim.AdamW(learned, lr=budget.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
        self.ema = EMAModel(learned, decay=budget.ema, use_ema_warmup=True, power=0.75, foreach=True)
        self.state: dict[str, Any] = {"step": 0, "samples": 0, "seconds": 0.0, "joules": 0.0, "losses": []}
        self.evaluations: list[dict] = []
        self._resume()
        self.ema.to(accelerator.device)
        # One wrapped module holds the parameters of several modules, so processes exchange all gradients together.
        self.wrapped = accelerator.prepare(self.objective)
        # The compiled forward pass is set on the module only while it trains. Evaluations have other shapes.
        denoiser = self.objective.denoiser
        self.fast = {"forward": torch.compile(denoiser.forward, dynamic=False)} if compiled else {}
        self.compiled = compiled
        vars(denoiser).update(self.fast)

    # --- checkpoints

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def _resume(self) -> None:
        if not self.checkpoint.exists():
            return
        saved = files.read_state(self.checkpoint)
        self.objective.load_state_dict(saved["objective"])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.ema.load_state_dict(saved["ema"])
        self.state = saved["state"]
        # If the run was killed between an evaluation and the next checkpoint, this evaluation is repeated.
        done = self.folder / "evaluations.json"
        known = json.loads(done.read_text()) if done.exists() else []
        self.evaluations = [e for e in known if e["samples"] <= self.state["samples"]]
        if self.main:
            self.log(f"resumed at step {self.state['step']}, {self.state['samples']} samples")

    def _save(self) -> None:
        parts = {"objective": self.objective, "optimiser": self.optimiser, "ema": self.ema}
        state = {k: part.state_dict() for k, part in parts.items()} | {"state": self.state}
        files.write_state(self.checkpoint, state)

    # --- evaluation

    def _is_due(self) -> bool:
        """Whether the next evaluation is due: at regular intervals, DENSE times as often while spelling is learned."""
        count = self.budget.evaluations
        if not count:
            return False
        last = self.evaluations[-1] if self.evaluations else {"samples": 0, "characters": 0.0}
        # A patch of all layers may write letters earlier than the prompt.
        binding = max(last["characters"], last.get("all_layers", 0.0)) >= 0.1 and last["characters"] < 0.75
        every = self.budget.samples / (count * (DENSE if binding else 1))
        ended = self.state["samples"] >= self.budget.samples > last["samples"]
        return ended or self.state["samples"] - last["samples"] >= every

    def _evaluate(self) -> None:
        self.ema.store(self.learned)
        self.ema.copy_to(self.learned)
        self.pipe.to(self.accelerator.device)
        self.objective.eval()
        for part in self.fast:
            delattr(self.objective.denoiser, part)
        with torch.no_grad():
            found = evaluate(self.pipe, self.spec, pairs=self.budget.pairs, only=self.only)
        result = {"samples": self.state["samples"], "seconds": round(self.state["seconds"]), **found}
        least, most = CANDIDATES
        if least <= result["exact"] < most:
            weights = {k: v.half().cpu().contiguous() for k, v in self.objective.denoiser.state_dict().items()}
            with files.whole_folder(self.folder / "early" / str(result["samples"])) as early:
                save_file(weights, early / "denoiser.safetensors", metadata={"format": "pt"})
        self.objective.train()
        vars(self.objective.denoiser).update(self.fast)
        self.ema.restore(self.learned)
        self.evaluations.append(result)
        files.write_json(self.folder / "evaluations.json", self.evaluations)
        self.log(json.dumps({k: v for k, v in result.items() if not isinstance(v, list)}))

    # --- training

    def _step(self, progress: float) -> float:
        """Make one step of the optimiser and return the loss."""
        accelerator, budget = self.accelerator, self.budget
        for group in self.optimiser.param_groups:
            group["lr"] = budget.lr * lr_factor(progress, self.state["step"], budget.decay)
        key = (self.seed, self.state["step"], accelerator.process_index)
        _, runs, easy, named = [stage for stage in budget.curriculum if progress >= stage[0]][-1]
        rows = budget.batch // accelerator.num_processes
        x, captions, cells = self.data.batch(rows, runs, easy, named, random.Random(str(key)))
        weights = (1 + (budget.text_weight - 1) * cells).to(accelerator.device)
        tokens = {k: v.to(accelerator.device) for k, v in self.rules.tokenize(self.pipe, captions).items()}
        # On the CPU with bfloat16, the backward pass of fused attention is several times slower than plain matrix
        # products for the few tokens of latents. For the many tokens of pictures, it is a fifth faster.
        plain = self.cpu and self.latent and self.precision == "bf16"
        with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
            with accelerator.autocast():
                loss = self.wrapped(x.to(accelerator.device), tokens, step_generator(*key), weights / weights.mean())
            accelerator.backward(loss)
        accelerator.clip_grad_norm_(self.learned, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.ema.step(self.learned)
        loss = loss.item()
        if not math.isfinite(loss):
            raise TextlocError(
                f"the loss is {loss} at step {self.state['step']}; start again with a lower --lr than {budget.lr:g}"
            )
        return loss

    def run(self) -> dict:
        """Train to the end. Returns the report, which is also written to the folder."""
        accelerator, state, budget = self.accelerator, self.state, self.budget
        last_save = clock = time.time()
        recent: list[float] = []
        bar = tqdm(total=100, desc=self.name, unit="%", mininterval=5) if self.main else None
        while True:
            progress = state["samples"] / budget.samples
            if self._is_due():
                if self.main:
                    self._evaluate()
                accelerator.wait_for_everyone()
                clock = time.time()
            if progress >= 1.0:
                break
            recent.append(self._step(progress))
            state["step"] += 1
            state["samples"] += budget.batch // accelerator.num_processes * accelerator.num_processes
            now = time.time()
            state["seconds"], state["joules"] = (
                state["seconds"] + now - clock,
                state["joules"] + _watts() * (now - clock),
            )
            clock = now
            if bar is not None and round(100 * progress) > bar.n:
                bar.update(round(100 * progress) - bar.n)
            if state["step"] % 100 == 0:
                state["losses"].append([state["samples"], round(float(np.mean(recent)), 5)])
                recent.clear()
                if self.main:
                    at, loss = state["losses"][-1]
                    self.log(f"step {state['step']}, {at} samples, {state['seconds']:.0f} s: loss {loss}")
            if self.main and now - last_save > budget.checkpoint_seconds:
                self._save()
                last_save = time.time()
        if bar is not None:
            bar.close()
        report = {
            "name": self.name,
            "seed": self.seed,
            "device": "cpu" if self.cpu else torch.cuda.get_device_name(),
            "processes": accelerator.num_processes,
            "precision": self.precision,
            "compiled": self.compiled,
            "torch": torch.__version__,
            **{k: state[k] for k in ("step", "samples", "losses")},
            "seconds": round(state["seconds"]),
            "watt_hours": round(state["joules"] / 3600, 1) or None,
            "budget": asdict(budget),
        }
        if self.main:
            self._save()
            self.ema.copy_to(self.learned)
            self.pipe.to("cpu")
            with files.whole_folder(self.folder / "pipeline") as part:
                self.pipe.save_pretrained(part)
            files.write_json(self.folder / "report.json", report)
        accelerator.wait_for_everyone()
        return report


def _watts() -> float:
    """The current power of the GPU in watts, or 0 if it is unknown."""
    try:
        return torch.cuda.power_draw() / 1000 if torch.cuda.is_available() else 0.0
    except Exception:  # the driver's library is missing or does not report the power
        return 0.0
