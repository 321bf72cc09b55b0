"""Train a miniature from scratch: autoencoder, a pool of encoded scenes, text encoders and denoiser.

A recipe is a module with SPEC, ENCODERS, ``pipeline``, ``Objective`` and ``tokenize``, ``autoencoder`` unless it works
on pixels, ``pretrain`` where its text encoder learns before the denoiser, and BUDGET where its defaults differ. Its
``Stage2``, where it has one, is made from stage I's folder and offers the same.

One command, ``textloc train NAME``, on one process or several (``accelerate launch``), CPU or CUDA, resumable
after a kill at any point. Every random number is drawn from (seed, step, process), so that a resumed run sees
what an uninterrupted one would have seen.
"""

import importlib
import json
import os
import random
import shutil
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from textloc_utils.generate import step_generator
from textloc_utils.miniatures import autoencoder, scenes
from textloc_utils.miniatures.evaluation import evaluate
from textloc_utils.models import ModelSpec, pick_device
from textloc_utils.settings import PATIENCE, TextlocError, check_writable, quiet_libraries

RECIPES = ("sd3-mini", "sdxl-mini", "if-mini", "ldm-mini")
LENGTHS = (3, 4, 5, 6, scenes.RUNS)  #: what the pool holds, an equal share of each


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a training run may spend; it stops at whichever of ``samples`` and ``seconds`` ends first.

    ``autoencoder_seconds``, ``pool`` (scenes encoded once) and ``encoder_steps`` (where the text encoder learns first)
    come before the denoiser's ``seconds``. A recipe of two
    stages shares ``samples`` and ``seconds`` out.
    The learning rate ``lr`` falls linearly over the last share ``decay`` of the budget.
    ``curriculum`` lists (share of the budget, word lengths drawn from there on). Words of one length teach the shapes
    of letters; then letters in runs teach which letter is which, since a text that is the same everywhere can be drawn
    before the model knows where to look for each letter; places and lengths come last, and quickly.
    """

    samples: int = 170_000
    seconds: float = 5400.0
    autoencoder_seconds: float = 900.0
    encoder_steps: int = 400
    pool: int = 61_440
    batch: int = 32
    lr: float = 1.5e-3
    decay: float = 0.4
    ema: float = 0.9995
    evaluations: int = 14
    checkpoint_seconds: float = 120.0
    curriculum: tuple = (
        (0.0, (6,)),
        (0.35, (scenes.RUNS,)),
        (0.45, (scenes.RUNS, 6)),
        (0.63, (3, 4, 5, 6)),
    )


def recipe(name: str):
    """The recipe module of a miniature."""
    if name not in RECIPES:
        raise TextlocError(f"unknown miniature {name!r}; known miniatures: {', '.join(RECIPES)}")
    return importlib.import_module(f"textloc_utils.miniatures.{name.replace('-', '_')}")


def default_budget(name: str) -> Budget:
    """What a miniature's recipe spends unless told otherwise."""
    return Budget(**getattr(recipe(name), "BUDGET", {}))


def write_json(path: Path, value) -> None:
    """Write JSON beside its place first, so that no reader ever meets half a file."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(part, path)


# --- the pool of encoded scenes ------------------------------------------------------------------------------


@torch.no_grad()
def encode_scenes(vae, n: int, length: int | str, seed: int, path: Path) -> None:
    """Encode ``n`` random scenes of one ``length`` (see ``scenes.random_scene``) to normalised latents at ``path``.

    The file holds ``latents`` float16 (n, C, h, w), the autoencoder's mean, shifted and scaled as the pipeline
    expects them; the scenes stand beside it as JSON.
    """
    rng = random.Random(f"{seed} {length}")
    device = next(vae.parameters()).device
    vae.to(memory_format=torch.channels_last)
    todo = [scenes.random_scene(rng, (length,)) for _ in range(n)]
    shift, scale = vae.config.shift_factor or 0.0, vae.config.scaling_factor
    out = []
    for start in tqdm(range(0, n, 64), desc=f"encoding scenes, length {length}"):
        x = autoencoder.to_tensor(np.stack([scenes.render(s) for s in todo[start : start + 64]])).to(device)
        # Its rounding is far below what the autoencoder itself loses.
        with torch.autocast(device.type, torch.bfloat16, enabled=autoencoder.has_bf16(device)):
            mean = vae.encode(x).latent_dist.mean
        out.append(((mean.float() - shift) * scale).half().cpu())
    write_json(path.with_suffix(".json"), [asdict(s) for s in todo])
    part = path.with_suffix(".part")
    save_file({"latents": torch.cat(out).contiguous()}, part)
    os.replace(part, path)


class Pool:
    """Encoded scenes by word length, each length read from its file when it is first drawn."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.parts: dict[int | str, tuple[torch.Tensor, list[scenes.Scene]]] = {}

    def part(self, length: int | str) -> tuple[torch.Tensor, list[scenes.Scene]]:
        """Latents and scenes of one word length."""
        if length not in self.parts:
            path = self.folder / f"pool-{length}.safetensors"
            known = [scenes.Scene(**s) for s in json.loads(path.with_suffix(".json").read_text())]
            self.parts[length] = load_file(path)["latents"], known
        return self.parts[length]

    def batch(self, n: int, lengths: tuple[int | str, ...], rng: random.Random, drop: float = 0.1):
        """(latents float32 (n, C, h, w), captions); a share ``drop`` of the captions is empty, for guidance."""
        latents, captions = [], []
        for _ in range(n):
            encoded, known = self.part(rng.choice(lengths))
            row = rng.randrange(len(known))
            latents.append(encoded[row])
            captions.append("" if rng.random() < drop else scenes.caption(known[row], rng))
        return torch.stack(latents).float(), captions


class Drawn:
    """Scenes in pixels, drawn anew for every batch: what a recipe without an autoencoder learns from."""

    def batch(self, n: int, lengths: tuple[int | str, ...], rng: random.Random, drop: float = 0.1):
        """(pictures float32 (n, 3, H, W) in -1..1, captions), otherwise as ``Pool.batch``."""
        known = [scenes.random_scene(rng, lengths) for _ in range(n)]
        captions = ["" if rng.random() < drop else scenes.caption(s, rng) for s in known]
        return autoencoder.to_tensor(np.stack([scenes.render(s) for s in known])), captions


# --- the run -------------------------------------------------------------------------------------------------


def lr_factor(progress: float, step: int, decay: float, warmup: int = 100) -> float:
    """Linear warm-up by steps, constant, then a linear decay over the last share ``decay`` of the budget."""
    return min(1.0, (step + 1) / warmup) * min(1.0, max(0.02, (1 - progress) / decay))


def prepare(
    name: str, folder: Path, budget: Budget, seed: int, device: str = "cpu", log=print, start: Path | None = None
) -> None:
    """Train the autoencoder (or take ``start``'s) and encode the pool, each once; both are kept in the run's folder.

    A recipe in pixel space has neither.
    """
    rules = recipe(name)
    if not hasattr(rules, "autoencoder"):
        return
    vae_folder = folder / "vae"
    if not (vae_folder / "config.json").exists():
        if start is None:
            torch.manual_seed(seed)
            vae = rules.autoencoder().to(device)
            report = autoencoder.train(vae, seconds=budget.autoencoder_seconds, seed=seed, log=log)
            autoencoder.set_latent_statistics(vae)
        else:
            vae = type(rules.autoencoder()).from_pretrained(
                next(part for part in (start / "vae", start / "vqvae") if part.is_dir())
            )
            report = _history(start)["autoencoder"]
        part = folder / "vae.part"
        vae.save_pretrained(part)
        write_json(part / "report.json", report)
        part.rename(vae_folder)
    paths = {length: folder / f"pool-{length}.safetensors" for length in LENGTHS}
    missing = {length: path for length, path in paths.items() if not path.exists()}
    if missing:
        # Read back, so that a resumed run encodes with what an uninterrupted one does.
        vae = type(rules.autoencoder()).from_pretrained(vae_folder).to(device)
    for length, path in missing.items():
        encode_scenes(vae, budget.pool // len(LENGTHS), length, seed, path)


def train(
    name: str,
    folder: Path,
    *,
    budget: Budget | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    compiled: bool = False,
    start: Path | None = None,
    log=print,
) -> dict | None:
    """Train miniature ``name`` in ``folder``, or go on where its checkpoint was.

    ``budget`` defaults to the recipe's. A new run begins with the weights of the shipped miniature in the folder
    ``start`` where one is given, else with untrained ones. With ``compiled`` torch compiles the denoiser's forward
    pass first. Returns the training report, None in other processes than the main one.

    The EMA weights are evaluated ``budget.evaluations`` times, evenly over the budget, into
    ``folder/evaluations.json``; the finished pipeline is saved to ``folder/pipeline``. A second stage follows in
    ``folder/stage2``, is not evaluated by itself, and ends in ``folder/pipeline/stage2``.
    """
    quiet_libraries()
    place = pick_device(device)
    rules = recipe(name)
    budget = budget or default_budget(name)
    before = None if start is None else _history(start)
    if before is not None and before["name"] != name:
        raise TextlocError(f"{start} holds {before['name']}; {name} can only start from a {name}")
    check_writable(folder).mkdir(parents=True, exist_ok=True)
    if precision == "auto":
        precision = "bf16" if autoencoder.has_bf16(place) else "fp32"
    accelerator = Accelerator(
        cpu=place.type == "cpu",
        mixed_precision="no" if precision == "fp32" else precision,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],  # the main process prepares the data alone
    )
    main = accelerator.is_main_process
    if main:
        prepare(name, folder, budget, seed, str(accelerator.device), log, start)
    accelerator.wait_for_everyone()
    second = getattr(rules, "Stage2", None)
    part = _part(budget, 1 - second.SHARE) if second else budget
    report = _train_stage(name, rules, folder, part, seed, accelerator, precision, compiled, log, start)
    if second:
        rules, part = second(folder / "pipeline"), _part(budget, second.SHARE, evaluations=0)
        place = start and start / "stage2"
        folder2 = folder / "stage2"
        stage2 = _train_stage(name, rules, folder2, part, seed, accelerator, precision, compiled, log, place)
        if main:
            report["stage2"] = stage2
            shutil.copytree(folder2 / "pipeline", folder / "pipeline" / "stage2")
    if main:
        if before is not None:
            earlier = before.get("before", {"samples": 0, "seconds": 0})
            report["before"] = {k: before[k] + earlier[k] for k in earlier}
        write_json(folder / "report.json", report)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return report if main else None


def _history(folder: Path) -> dict:
    """The report of a shipped miniature's training."""
    try:
        return json.loads((folder / "training.json").read_text())["report"]
    except (OSError, ValueError, KeyError):
        raise TextlocError(f"no trained miniature in {folder}; give a folder of data/miniatures") from None


def _take_weights(pipe, folder: Path) -> None:
    """Give every network of the pipeline the weights that it has in a saved one."""
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            part.load_state_dict(type(part).from_pretrained(folder / name).state_dict())


def _part(budget: Budget, share: float, **other) -> Budget:
    return replace(budget, samples=round(budget.samples * share), seconds=budget.seconds * share, **other)


def _train_stage(
    name: str,
    rules,
    folder: Path,
    budget: Budget,
    seed: int,
    accelerator: Accelerator,
    precision: str,
    compiled: bool,
    log,
    start: Path | None,
) -> dict:
    """Train what one recipe (a module, or its Stage2) holds; the report of the main process is also in the folder."""
    cpu, main = accelerator.device.type == "cpu", accelerator.is_main_process
    spec = ModelSpec(name=name, source=str(folder), miniature=True, **rules.SPEC)
    folder.mkdir(parents=True, exist_ok=True)
    latent = hasattr(rules, "autoencoder")
    pool = Pool(folder) if latent else Drawn()
    torch.manual_seed(seed)
    if latent:
        vae = type(rules.autoencoder()).from_pretrained(folder / "vae").eval()
        pipe = rules.pipeline(vae)
    else:
        pipe = rules.pipeline()
    pipe.set_progress_bar_config(disable=True)
    checkpoint = folder / "checkpoint.pt"
    if hasattr(rules, "pretrain") and start is None and not checkpoint.exists():
        right = rules.pretrain(pipe, seed, budget.encoder_steps)  # in every process, with the same outcome
        if main:
            log(f"text encoder: {right:.3f} of the letters' places named rightly")
    objective = rules.Objective(pipe).to(accelerator.device).train()
    if start is not None and not checkpoint.exists():
        _take_weights(pipe, start)
    optimiser = torch.optim.AdamW(
        objective.parameters(), lr=budget.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    ema = EMAModel(objective.parameters(), decay=budget.ema, use_ema_warmup=True, power=0.75, foreach=True)
    state = {"step": 0, "samples": 0, "seconds": 0.0, "losses": [], "evaluated": 0}
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if saved.get("seed", seed) != seed:
            raise TextlocError(f"{folder} holds a run of seed {saved['seed']}; name another folder for seed {seed}")
        objective.load_state_dict(saved["objective"])
        optimiser.load_state_dict(saved["optimiser"])
        ema.load_state_dict(saved["ema"])
        state = saved["state"]
        if main:
            log(f"resumed at step {state['step']}, {state['samples']} samples")
    ema.to(accelerator.device)
    # Several modules' parameters step under one wrapped module, so that processes share one gradient exchange.
    wrapped = accelerator.prepare(objective)
    # Set on the module itself while it trains, so that evaluations, whose shapes differ, run as ever.
    fast = {"forward": torch.compile(objective.denoiser.forward, dynamic=False)} if compiled else {}
    vars(objective.denoiser).update(fast)

    def save() -> None:
        part = checkpoint.with_suffix(".part")
        torch.save(
            {
                "objective": objective.state_dict(),
                "optimiser": optimiser.state_dict(),
                "ema": ema.state_dict(),
                "state": state,
                "seed": seed,
            },
            part,
        )
        os.replace(part, checkpoint)

    evaluations_file = folder / "evaluations.json"
    evaluations = json.loads(evaluations_file.read_text()) if evaluations_file.exists() else []
    # A kill may fall between an evaluation and the next checkpoint: what the checkpoint has not reached is redone.
    evaluations = [e for e in evaluations if e["samples"] <= state["samples"]]

    def run_evaluation() -> None:
        ema.store(objective.parameters())
        ema.copy_to(objective.parameters())
        pipe.to(accelerator.device)
        objective.eval()
        for part in fast:
            delattr(objective.denoiser, part)
        with torch.no_grad():
            result = {"samples": state["samples"], "seconds": round(state["seconds"]), **evaluate(pipe, spec)}
        objective.train()
        vars(objective.denoiser).update(fast)
        ema.restore(objective.parameters())
        evaluations.append(result)
        write_json(evaluations_file, evaluations)
        log(json.dumps({k: v for k, v in result.items() if not isinstance(v, list)}))

    rank, processes = accelerator.process_index, accelerator.num_processes
    local = budget.batch // processes
    last_save = clock = time.time()
    recent: list[float] = []
    bar = tqdm(total=100, desc=name, unit="%") if main else None
    while True:
        # The main process's clock decides for everybody: processes must agree on the last step.
        progress = max(state["samples"] / budget.samples, state["seconds"] / budget.seconds)
        if processes > 1:
            shared = torch.tensor([progress, state["seconds"]], device=accelerator.device)
            torch.distributed.broadcast(shared, 0)
            progress, state["seconds"] = shared.tolist()
        due = int(min(1.0, progress) * budget.evaluations)
        if due > state["evaluated"]:
            state["evaluated"] = due
            if main:
                run_evaluation()
            accelerator.wait_for_everyone()
            clock = time.time()
        if progress >= 1.0:
            break
        lengths = [words for at, words in budget.curriculum if progress >= at][-1]
        for group in optimiser.param_groups:
            group["lr"] = budget.lr * lr_factor(progress, state["step"], budget.decay)
        key = (seed, state["step"], rank)
        latents, captions = pool.batch(local, lengths, random.Random(str(key)))
        tokens = {k: v.to(accelerator.device) for k, v in rules.tokenize(pipe, captions).items()}
        # On the CPU, bfloat16's fused attention backward is several times slower than plain matrix products on the few
        # tokens of latents, and a fifth faster on the many of pictures.
        with sdpa_kernel(SDPBackend.MATH) if cpu and latent and precision == "bf16" else nullcontext():
            with accelerator.autocast():
                loss = wrapped(latents.to(accelerator.device), tokens, step_generator(*key))
            accelerator.backward(loss)
        accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        ema.step(objective.parameters())
        recent.append(loss.item())
        state["step"] += 1
        state["samples"] += local * processes
        now = time.time()
        state["seconds"] += now - clock
        clock = now
        if bar is not None and round(100 * progress) > bar.n:
            bar.update(round(100 * progress) - bar.n)
        if state["step"] % 100 == 0:
            state["losses"].append([state["samples"], round(float(np.mean(recent)), 5)])
            recent.clear()
            if main:
                at, loss = state["losses"][-1]
                log(f"step {state['step']}, {at} samples, {state['seconds']:.0f} s: loss {loss}")
        if main and now - last_save > budget.checkpoint_seconds:
            save()
            last_save = time.time()
    if bar is not None:
        bar.close()
    report = {
        "name": name,
        "seed": seed,
        "device": "cpu" if cpu else torch.cuda.get_device_name(),
        "processes": processes,
        "precision": precision,
        "compiled": compiled,
        "torch": torch.__version__,
        **{k: state[k] for k in ("step", "samples", "losses")},
        "seconds": round(state["seconds"]),
        "budget": asdict(budget),
        "autoencoder": json.loads((folder / "vae" / "report.json").read_text()) if latent else None,
    }
    if main:
        save()
        write_json(folder / "report.json", report)
        ema.copy_to(objective.parameters())
        part = folder / "pipeline.part"
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(folder / "pipeline", ignore_errors=True)
        pipe.to("cpu")
        pipe.save_pretrained(part)
        part.rename(folder / "pipeline")
    accelerator.wait_for_everyone()
    return report
