"""LoRA on chosen text layers (paper, section 5.1): train a model to write better, and keep its other weights unchanged.

Small adapters (Hu et al. 2022) are added to the Linear modules of some text layers. Nothing else is trained. Text
embeddings and latents are computed once, before the training. The backward pass ends at the first adapter, so a set of
late layers needs less time and memory per step than all layers.
"""

import contextlib
import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.models.attention_processor import Attention
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from tqdm.auto import tqdm

from textloc_utils import files
from textloc_utils.experiment import fingerprint
from textloc_utils.generate import conditions, step_generator
from textloc_utils.models import (
    PROJECTIONS,
    Model,
    as_indices,
    check_layers,
    denoise,
    projections,
    self_attention,
    take_rows,
)
from textloc_utils.settings import TextlocError, check_writable, first_line, quiet_libraries

FILE = "pytorch_lora_weights.safetensors"  #: the file name that diffusers expects
ABOUT = "textloc_lora.json"  #: in the same folder: the settings of the training and its report
CHECKPOINT = "checkpoint.pt"
ADAPTER = "default"
_OTHER_RUN = "{} holds a run with other settings, data, weights or processes; choose another folder, or delete it"
_CORRUPT = "{} is corrupt; delete the folder and train again"
#: Number of consecutive steps that half precision may skip while it looks for a suitable scale of its gradients.
SKIPPED = 20
_ONE_DEVICE = "one process can train only on one device and in one precision; start another process for this"


@dataclass(frozen=True, kw_only=True)
class Training:
    """The adapters to train, and the settings of the training.

    ``projections`` are names of ``models.PROJECTIONS``. If a layer does not have one of them, it takes the others.
    ``self_attention`` also adapts the picture's self-attention. ``drop`` is the share of captions that are left out,
    for guidance.
    """

    layers: tuple[int, ...]
    rank: int = 8
    projections: tuple[str, ...] = PROJECTIONS
    self_attention: bool = False
    steps: int = 300
    batch: int = 32
    lr: float = 5e-3
    seed: int = 0
    drop: float = 0.1

    def __post_init__(self):
        object.__setattr__(self, "layers", as_indices(self.layers, "layers"))
        for name, most in (("rank", 4096), ("steps", math.inf), ("batch", math.inf), ("lr", 1)):
            if not 0 < getattr(self, name) <= most:
                limit = "" if most == math.inf else f" and at most {most}"
                raise TextlocError(f"{name} must be above 0{limit}, got {getattr(self, name)}")
        if self.seed < 0 or not 0 <= self.drop <= 1:
            raise TextlocError(f"seed must be at least 0 and drop from 0 to 1, got {self.seed} and {self.drop}")
        wrong = [name for name in self.projections if name not in PROJECTIONS]
        if wrong:
            raise TextlocError(f"unknown projection {wrong[0]!r}; allowed: {', '.join(PROJECTIONS)}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Data:
    """Pictures and captions in the form that the denoiser takes, computed once.

    ``latents``, (n, ...), are as from ``Model.encode``. ``given`` holds the denoiser's arguments for n + 1 rows. The
    last row is for an empty caption. ``digest`` is a short hash of the pictures and captions. A run can be resumed only
    with the same data.
    """

    latents: torch.Tensor
    given: dict
    digest: str

    def __len__(self) -> int:
        return len(self.latents)


@dataclass(frozen=True, kw_only=True)
class Report:
    """The size, losses and cost of a training run.

    ``parameters`` is the number of trained parameters. ``losses`` holds the loss of each step. ``seconds_per_step`` is
    the median. ``saved_bytes`` is the size of the tensors that a step keeps for its backward pass, without the model's
    weights. It is counted, and so the same on every machine. ``peak_bytes`` is the peak of the GPU's memory (None on
    the CPU).
    """

    parameters: int
    losses: list[float]
    seconds_per_step: float
    saved_bytes: int
    peak_bytes: int | None


# --- adapters -------------------------------------------------------------------------------------------------


def targets(model: Model, training: Training) -> list[str]:
    """Dotted names of the Linear modules that get an adapter. Raises TextlocError if there would be none."""
    check_layers(model, training.layers)
    names = []
    for index in sorted(set(training.layers)):
        found = projections(model.denoiser, model.layers[index])
        names += [path for name, path in found.items() if name in training.projections]
    if training.self_attention:
        names += self_attention(model.denoiser)
    if not names:
        raise TextlocError("there is no Linear module to adapt; choose at least one layer and one of its projections")
    return names


def parameters(model: Model, training: Training) -> int:
    """Number of the adapters' parameters."""
    modules = [model.denoiser.get_submodule(name) for name in targets(model, training)]
    return training.rank * sum(m.in_features + m.out_features for m in modules)


def add(model: Model, training: Training) -> list[nn.Parameter]:
    """Add untrained adapters, which change nothing yet, to the denoiser. Returns their parameters (float32)."""
    _check_bare(model)
    names = targets(model, training)
    with torch.random.fork_rng():
        torch.manual_seed(training.seed)
        model.denoiser.add_adapter(LoraConfig(r=training.rank, lora_alpha=training.rank, target_modules=names), ADAPTER)
    added = [p for p in model.denoiser.parameters() if p.requires_grad]
    for parameter in added:
        parameter.data = parameter.data.float()
    return added


def _check_bare(model: Model) -> None:
    if getattr(model.denoiser, "peft_config", None):
        raise TextlocError("the model already has an adapter; remove it first")
    if any(map(_is_fused, model.denoiser.modules())):
        raise TextlocError(
            "the pipeline's projections are fused, so adapters on them have no effect; "
            "call unfuse_qkv_projections() first"
        )


def _is_fused(module: nn.Module) -> bool:
    """Whether an attention module uses fused projections. Older classes keep the attribute True after unfusing."""
    named = type(getattr(module, "processor", None)).__name__
    return getattr(module, "fused_projections", False) and ("Fused" in named or not isinstance(module, Attention))


def remove(model: Model) -> None:
    """Remove the adapter. Then the denoiser is exactly as it was before."""
    if getattr(model.denoiser, "peft_config", None):
        model.denoiser.unload_lora()


def save(model: Model, folder: str | os.PathLike, about: dict) -> Path:
    """Write the adapter as diffusers' LoRA file, and ``about`` as JSON in the same folder. Returns the file's path.

    Pipelines of diffusers load it with ``pipe.load_lora_weights(folder)``. LDMTextToImagePipeline has no such method.
    It loads it with ``pipe.unet.load_lora_adapter(folder, prefix="unet")``.
    """
    folder = check_writable(folder)
    _check_weights(model, "nothing is saved")
    part = "transformer" if getattr(model.pipe, "transformer", None) is not None else "unet"
    state = get_peft_model_state_dict(model.denoiser, adapter_name=ADAPTER)
    config = model.denoiser.peft_config[ADAPTER].to_dict()
    writer = type(model.pipe) if hasattr(model.pipe, "save_lora_weights") else StableDiffusionLoraLoaderMixin
    with files.whole_files(folder, ABOUT, FILE) as aside:
        writer.save_lora_weights(aside, **{f"{part}_lora_layers": state, f"{part}_lora_adapter_metadata": config})
        about = files.sealed(about | {"sha256": files.sha256_of(aside / FILE)})
        (aside / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
    return folder / FILE


def _check_weights(model: Model, outcome: str) -> None:
    """Raise TextlocError if a weight of the model's adapter is not finite."""
    for name, weight in get_peft_model_state_dict(model.denoiser, adapter_name=ADAPTER).items():
        if not weight.isfinite().all():
            raise TextlocError(f"the adapter's weight {name} is not finite; {outcome}")


def check_adapter(folder: str | os.PathLike) -> Path:
    """Return the folder as a path. Raises TextlocError if it has no adapter file."""
    folder = Path(folder)
    if not (folder / FILE).is_file():
        raise TextlocError(f"no adapter in {folder} ({FILE} is missing); textloc lora train writes one")
    return folder


def load(model: Model, folder: str | os.PathLike) -> dict:
    """Load a saved adapter into the model. Returns the ``about`` of :func:`save` ({} if there is none).

    Raises TextlocError if the folder has no adapter file, if the adapter belongs to another model, is damaged or is not
    finite, or if the model already has an adapter.
    """
    folder = check_adapter(folder)
    _check_bare(model)
    about = _about(folder)
    options = {"weight_name": FILE, "local_files_only": True, "adapter_name": ADAPTER}
    quiet_libraries()
    try:
        if hasattr(model.pipe, "load_lora_weights"):
            model.pipe.load_lora_weights(folder, **options)
        else:
            model.denoiser.load_lora_adapter(folder, prefix="unet", **options)
        if not getattr(model.denoiser, "peft_config", None):  # the library only warns
            raise ValueError(f"it has no weights for a {type(model.denoiser).__name__}")
    except Exception as error:  # the libraries raise many unrelated classes here
        remove(model)
        raise TextlocError(f"the adapter in {folder} does not fit {model.spec.name}: {first_line(error)}") from None
    try:
        _check_weights(model, f"train the adapter in {folder} again")
    except TextlocError:
        remove(model)
        raise
    return about


def _about(folder: Path) -> dict:
    """Read the ``about`` of a saved adapter ({} if none). Raises TextlocError if it or the adapter was changed."""
    path = folder / ABOUT
    if not path.is_file():
        return {}
    try:
        about = json.loads(path.read_text())
        own = about.keys() & {"seal", "sha256"}  # earlier versions wrote none of them
        if own and (about != files.sealed(about) or about["sha256"] != files.sha256_of(folder / FILE)):
            raise ValueError
    except (ValueError, KeyError, AttributeError, RecursionError):
        raise TextlocError(_CORRUPT.format(path)) from None
    return {key: value for key, value in about.items() if key not in own}


# --- data -----------------------------------------------------------------------------------------------------


def prepare(model: Model, pictures: np.ndarray, captions: Sequence[str]) -> Data:
    """Encode pictures, uint8 (n, H, W, 3) of the model's size, and their captions.

    Raises TextlocError if the pictures have the wrong size, if there is not one caption per picture, or if the encoded
    values are not finite.
    """
    if len(pictures) != len(captions) or not len(pictures):
        raise TextlocError(f"{len(pictures)} pictures came with {len(captions)} captions; give one caption per picture")
    height, width = model.spec.height, model.spec.width
    if pictures.shape[1:] != (height, width, 3):
        raise TextlocError(f"pictures for {model.spec.name} must be {height} x {width} x 3, got {pictures.shape[1:]}")
    # The digest is that of the inputs. Encoded values may be rounded differently on another machine.
    digest = hashlib.sha256(np.ascontiguousarray(pictures).tobytes() + repr(list(captions)).encode()).hexdigest()[:16]
    data = Data(latents=model.encode(pictures), given=conditions(model, [*captions, ""]), digest=digest)
    for row, latents in enumerate(data.latents):
        if not latents.isfinite().all():
            raise TextlocError(f"the autoencoder's output for picture {row} is not finite; choose another dtype")
    for name, value in data.given.items():
        if torch.is_tensor(value) and not value.isfinite().all():
            raise TextlocError(f"the captions' {name} are not finite; choose another dtype")
    return data


def load_folder(folder: str | os.PathLike, height: int, width: int) -> tuple[np.ndarray, list[str]]:
    """Read pictures, uint8 (n, height, width, 3), and captions of a folder in ``datasets``' "imagefolder" layout.

    The captions are in the column ``text`` of ``metadata.csv`` or ``metadata.jsonl``. Pictures are scaled, and their
    middle is cropped. Raises TextlocError for a folder without pictures or without captions.
    """
    from datasets import disable_progress_bars, load_dataset
    from PIL import ImageOps

    disable_progress_bars()
    try:
        rows = load_dataset("imagefolder", data_dir=str(folder), split="train")
        if "text" in rows.column_names and rows.features["text"].dtype not in ("string", "large_string", "null"):
            raise TypeError("its captions are numbers, but a caption must be text")
        if "text" in rows.column_names:
            pictures = [np.asarray(ImageOps.fit(row["image"].convert("RGB"), (width, height))) for row in rows]
            return np.stack(pictures), [row["text"] or "" for row in rows]
    except Exception as error:  # the library raises many unrelated classes here
        raise TextlocError(f"no pictures can be read from {folder}: {first_line(error)}") from None
    raise TextlocError(f"{folder} has no captions; metadata.csv needs the columns file_name and text")


# --- training -------------------------------------------------------------------------------------------------


class _Objective(nn.Module):
    """The denoiser's own training loss on rows of the data, with the scheduler's type of noise."""

    def __init__(self, model: Model, data: Data):
        super().__init__()
        self.denoiser = model.denoiser
        self._data, self._scheduler = data, model.pipe.scheduler  # not modules, so each process keeps its own

    def noised(self, x: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noisy x, the denoiser's training target, and the timesteps, 0 to 1000. Random numbers come from the CPU.

        The denoiser must read the prompt's text when noise hides it, so strong noise is used more often. Schedulers of
        flow matching shift a logit-normal noise level with their own setting (Esser et al. 2024). For all others, the
        density of the timesteps rises linearly.
        """
        n, config = len(x), self._scheduler.config
        noise = torch.randn(x.shape, generator=generator).to(x)
        shape = (-1,) + (1,) * (x.ndim - 1)
        if not hasattr(self._scheduler, "alphas_cumprod"):
            level = torch.sigmoid(torch.randn(n, generator=generator)).to(x)
            level = config.shift * level / (1 + (config.shift - 1) * level)
            s = level.view(shape)
            return (1 - s) * x + s * noise, noise - x, level * config.num_train_timesteps
        last = config.num_train_timesteps - 1
        t = (torch.rand(n, generator=generator).sqrt() * (last + 1)).long().clamp_max(last)
        alpha = self._scheduler.alphas_cumprod[t].to(x).view(shape)
        signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
        answers = {"epsilon": noise, "v_prediction": signal * noise - spread * x, "sample": x}
        return signal * x + spread * noise, answers[config.prediction_type], t.to(x.device)

    def forward(self, rows: list[int], captions: list[int], generator: torch.Generator) -> torch.Tensor:
        """Mean loss of the data's ``rows`` with the texts of the rows ``captions``."""
        x = self._data.latents[rows]
        noisy, answer, t = self.noised(x, generator)
        given = take_rows(self._data.given, captions, len(self._data) + 1)
        guess = denoise(self.denoiser, noisy.to(self.denoiser.dtype), t, given)
        return (guess.float() - answer).square().mean()


def train(
    model: Model,
    data: Data,
    training: Training,
    *,
    folder: str | os.PathLike | None = None,
    checkpoint_steps: int = 25,
    progress: bool = False,
) -> Report:
    """Train adapters, which stay in the model. With a ``folder``, they are saved there, and a killed run is resumed.

    Several processes (``accelerate launch``) divide each batch among themselves. Every random number depends only on
    (seed, step, process). So a resumed run ends with the weights of an uninterrupted run. A finished run is loaded.

    Raises TextlocError for invalid settings. Raises it for a folder with a run of other settings, data or weights, or
    with an unfinished run of another number of processes, and for a folder to which another run writes. Also raises it
    at the first loss, gradient or weight that is not finite. In this case nothing is saved.
    """
    folder = None if folder is None else check_writable(folder)
    _check_bare(model)
    names = targets(model, training)
    key = asdict(training) | {"model": model.spec.name, "weights": fingerprint(model), "data": data.digest}
    key |= {"dtype": str(model.denoiser.dtype).removeprefix("torch.")}
    with contextlib.ExitStack() as held:
        if folder is not None and os.environ.get("RANK", "0") == "0":
            held.enter_context(files.only_run(folder))
        if folder is not None and (folder / FILE).is_file():
            return _finished(model, folder, key)
        accelerator = _accelerator(model, training)
        trained = add(model, training)
        try:
            report = _run(model, data, training, trained, accelerator, key, folder, checkpoint_steps, progress)
        except BaseException:
            remove(model)
            raise
        if folder is not None and accelerator.is_main_process:
            save(model, folder, {"key": key, "targets": names, "report": asdict(report)})
            (folder / CHECKPOINT).unlink(missing_ok=True)
        accelerator.wait_for_everyone()
        return report


def _finished(model: Model, folder: Path, key: dict) -> Report:
    """Load the result of a finished run. Raises TextlocError if the run has another key."""
    about = _about(folder)
    if about.get("key") != json.loads(json.dumps(key)):
        raise TextlocError(_OTHER_RUN.format(folder))
    try:
        report = Report(**about["report"])
    except (KeyError, TypeError):
        raise TextlocError(_CORRUPT.format(folder / ABOUT)) from None
    load(model, folder)
    return report


def _accelerator(model: Model, training: Training) -> Accelerator:
    if model.device.type == "cuda":
        torch.cuda.set_device(model.device)  # accelerate uses the current device
    half = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(model.denoiser.dtype, "no")
    try:
        accelerator = Accelerator(cpu=model.device.type == "cpu", mixed_precision=half)
    except ValueError:  # the library keeps the first device and precision for the whole process
        raise TextlocError(_ONE_DEVICE) from None
    if accelerator.device.type != model.device.type:
        raise TextlocError(_ONE_DEVICE)
    if training.batch % accelerator.num_processes:
        raise TextlocError(f"the batch must be a multiple of {accelerator.num_processes}, the number of processes")
    return accelerator


def _run(
    model: Model,
    data: Data,
    training: Training,
    trained: list[nn.Parameter],
    accelerator: Accelerator,
    key: dict,
    folder: Path | None,
    checkpoint_steps: int,
    progress: bool,
) -> Report:
    optimiser = torch.optim.AdamW(trained, lr=training.lr, weight_decay=0.0)
    losses, seconds, kept = [], [], 0
    checkpoint = folder and folder / CHECKPOINT
    key = key | {"processes": accelerator.num_processes}  # each process draws different random numbers
    if checkpoint and checkpoint.exists():
        saved = files.read_state(checkpoint)
        if saved["key"] != key:
            raise TextlocError(_OTHER_RUN.format(folder))
        set_peft_model_state_dict(model.denoiser, saved["adapter"], adapter_name=ADAPTER)
        optimiser.load_state_dict(saved["optimiser"])
        losses, seconds, kept = saved["losses"], saved["seconds"], saved["kept"]
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(saved["scaler"])
    objective, optimiser = accelerator.prepare(_Objective(model, data), optimiser)
    rank, processes = accelerator.process_index, accelerator.num_processes
    local, begin, skipped = training.batch // processes, len(losses), 0
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in tqdm(
        range(begin, training.steps),
        initial=begin,
        total=training.steps,
        desc=f"{model.spec.name}: adapters",
        unit="step",
        disable=not (progress and accelerator.is_main_process),
    ):
        began = time.perf_counter()
        generator = step_generator(training.seed, step, rank)
        rows = torch.randint(len(data), (local,), generator=generator).tolist()
        dropped = (torch.rand(local, generator=generator) < training.drop).tolist()
        captions = [len(data) if drop else row for row, drop in zip(rows, dropped, strict=True)]
        # The tensors kept for the backward pass are counted only once, because counting takes time.
        counting: Any = contextlib.nullcontext({}) if kept else _saved(model.denoiser)
        with counting as sizes, accelerator.autocast():
            loss = objective(rows, captions, generator)
        kept = kept or sum(sizes.values())
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
        _check_number(f"the loss of step {step + 1}", losses[-1], training)
        if loss.requires_grad:
            accelerator.backward(loss)
        if step == begin and any(parameter.grad is None for parameter in trained):
            raise TextlocError(
                "an adapter has no effect on the model's output, so it cannot learn; load the pipeline again"
            )
        norm = accelerator.clip_grad_norm_(trained, 1.0)
        skipped = 0 if math.isfinite(norm) else skipped + 1
        if skipped > (SKIPPED if accelerator.scaler is not None else 0):
            _check_number(f"the gradient of step {step + 1}", float(norm), training)
        for group in optimiser.param_groups:  # constant, then falling over the last half
            group["lr"] = training.lr * min(1.0, 2 * (1 - step / training.steps))
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - began)
        # The last step is saved, too. So no training is lost if the disk is full when the adapter is saved.
        due = (step + 1) % checkpoint_steps == 0 or step + 1 == training.steps
        if due:  # in every process, so no process waits for one that has stopped
            _check_weights(
                model, f"step {step + 1} is not saved; a smaller learning rate than {training.lr:g} may help"
            )
        if checkpoint and due and accelerator.is_main_process:
            state = {
                "key": key,
                "adapter": get_peft_model_state_dict(model.denoiser, adapter_name=ADAPTER),
                "optimiser": optimiser.state_dict(),
                "scaler": accelerator.scaler and accelerator.scaler.state_dict(),
                "losses": losses,
                "seconds": seconds,
                "kept": kept,
            }
            files.write_state(checkpoint, state)
    # The result of the last step shows in the loss after it.
    generator = step_generator(training.seed, training.steps, rank)
    rows = torch.randint(len(data), (local,), generator=generator).tolist()
    with torch.no_grad(), accelerator.autocast():
        after = accelerator.reduce(objective(rows, rows, generator), "mean")
    _check_number("the loss after the last step", float(after), training)
    return Report(
        parameters=sum(p.numel() for p in trained),
        losses=[round(loss, 5) for loss in losses],
        seconds_per_step=statistics.median(seconds),
        saved_bytes=kept,
        peak_bytes=torch.cuda.max_memory_allocated() if accelerator.device.type == "cuda" else None,
    )


def _check_number(what: str, value: float, training: Training) -> None:
    if not math.isfinite(value):
        advice = f"a smaller learning rate than {training.lr:g} may help, or another dtype"
        raise TextlocError(f"{what} is {value}; training stops and nothing is saved; {advice}")


@contextlib.contextmanager
def _saved(module: nn.Module) -> Iterator[dict[int, int]]:
    """Map addresses to bytes of the tensors saved for the backward pass inside the block, without the weights."""
    own, seen = {p.untyped_storage().data_ptr() for p in module.parameters()}, dict[int, int]()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor.detach()  # the tensor itself would keep its graph alive

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield seen
