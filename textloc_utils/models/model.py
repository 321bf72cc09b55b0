"""A wrapped pipeline: its denoiser, its text layers, and the arguments of its call."""

import contextlib
import inspect
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import nn

from textloc_utils.models.architectures import (
    Architecture,
    TextLayer,
    architecture,
    family_of,
    pooled_site,
    text_layers,
)
from textloc_utils.models.registry import ModelSpec
from textloc_utils.settings import TextlocError

#: LDMTextToImagePipeline and IFPipeline pad every prompt to this many tokens, and ignore their tokenizer's limit.
FIXED_TOKENS = 77
#: Tokens that a chat template may add to a prompt. They count towards the pipeline's limit.
CHAT = 64


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Model:
    """A loaded pipeline, its denoiser and its text layers in execution order.

    ``stage2`` is the pipeline that enlarges the pictures, if there is one. Its layers do not belong to ``layers``.
    """

    spec: ModelSpec
    pipe: DiffusionPipeline
    denoiser: nn.Module
    layers: tuple[TextLayer, ...]
    pooled_site: str | None
    stage2: DiffusionPipeline | None = None

    @classmethod
    def from_pipeline(
        cls, pipe: DiffusionPipeline, spec: ModelSpec | None = None, stage2: DiffusionPipeline | None = None
    ) -> "Model":
        """Wrap any diffusers pipeline of a known architecture. ``spec`` defaults to the pipeline's own settings.

        Raises TextlocError for any other object, for a pipeline with two denoisers, and for a compiled denoiser.
        """
        denoiser = next((part for n in ("transformer", "unet") if (part := getattr(pipe, n, None)) is not None), None)
        if not isinstance(denoiser, nn.Module):
            raise TextlocError(f"a diffusers pipeline with a denoiser was expected, got {type(pipe).__name__}")
        if getattr(pipe, "transformer_2", None) is not None:
            raise TextlocError(
                "this pipeline has two denoisers, one for early and one for late steps; this is not supported"
            )
        check_hookable(denoiser)
        layers = text_layers(denoiser)
        if spec is None:
            spec = _spec_of(pipe, denoiser, family_of(layers))
        site = pooled_site(denoiser)
        return cls(spec=spec, pipe=pipe, denoiser=denoiser, layers=layers, pooled_site=site, stage2=stage2)

    @classmethod
    def of(cls, pipe: "DiffusionPipeline | Model") -> "Model":
        """Return a model unchanged, and wrap a pipeline. So every public function accepts both."""
        return pipe if isinstance(pipe, cls) else cls.from_pipeline(pipe)

    @property
    def architecture(self) -> Architecture:
        """The row of the table that describes how this denoiser reads text and how it is called."""
        return architecture(self.denoiser)

    @property
    def doubled(self) -> bool:
        """Whether guidance doubles the denoiser's batch. Other pipelines call it twice, or pass the scale to it."""
        return self.architecture.rows in ("doubled", "prompts first")

    def evaluations(self, guidance: float | None = None) -> int:
        """Denoiser rows per prompt and step: 2 if ``guidance`` (default: the model's own) needs negatives, else 1."""
        scale = self.spec.guidance if guidance is None else guidance
        row, config = self.architecture, getattr(self.denoiser, "config", {})
        told = row.told or getattr(config, "guidance_embeds", False) and row.guidance == "guidance_scale"
        distilled = getattr(self.pipe.config, "is_distilled", False)
        return 1 if told or distilled or scale <= row.above else 2

    def __repr__(self) -> str:
        return f"Model({self.spec.name}: {type(self.pipe).__name__}, {len(self.layers)} text layers, {self.device})"

    @property
    def device(self) -> torch.device:
        """The device on which the pipeline computes."""
        return self.pipe._execution_device

    @property
    def tokenizers(self) -> list[tuple[Any, int, bool]]:
        """The tokenizers whose text the layers read.

        Each one comes with the number of tokens that it takes (special tokens included), and with whether it is one of
        the architecture's long tokenizers. A tokenizer that gives only the pooled text (FLUX's CLIP) is not included,
        because it may cut a prompt.
        """
        row = self.architecture
        fixed = type(self.pipe).__name__ in ("LDMTextToImagePipeline", "IFPipeline")
        out = []
        for name in ("tokenizer", "processor", "tokenizer_2", "tokenizer_3", "tokenizer_4"):
            tokenizer = getattr(self.pipe, name, None)
            if tokenizer is None or name in row.pooling:
                continue
            # A processor holds its tokenizer. Its handling of input pictures is not needed here.
            tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
            limit = FIXED_TOKENS if fixed else tokenizer.model_max_length
            if name in row.long and self.spec.max_sequence_length:
                limit = self.spec.max_sequence_length
                limit -= CHAT if getattr(tokenizer, "chat_template", None) and limit > 2 * CHAT else 0
            out.append((tokenizer, limit, name in row.long))
        return out

    def call_arguments(
        self, prompts: list[str], *, steps: int, guidance: float, negative_prompt: str | None, **other
    ) -> dict:
        """Keyword arguments of the pipeline's call. They hide the differences between the pipeline classes."""
        row, takes = self.architecture, inspect.signature(self.pipe).parameters  # works for stand-ins of pipelines, too
        out: dict = {"prompt": list(prompts), "num_inference_steps": steps}
        if row.guidance != "guider":
            out[row.guidance] = guidance
        height, width = self.spec.stage1 or (self.spec.height, self.spec.width)
        out |= {"height": height, "width": width} | {k: v for k, v in row.call.items() if k in takes} | other
        if "max_sequence_length" in takes and self.spec.max_sequence_length:
            out.setdefault("max_sequence_length", self.spec.max_sequence_length)
        if "max_area" in takes:  # Kontext uses height and width only for the shape
            out |= {"max_area": height * width, "_auto_resize": False}
        if row.guidance == "true_cfg_scale" and out["true_cfg_scale"] > row.above and negative_prompt is None:
            negative_prompt = " "  # without a negative prompt there is no guidance
        if negative_prompt is not None:
            if "negative_prompt" not in takes:
                raise TextlocError(f"{type(self.pipe).__name__} takes no negative prompt")
            if "true_cfg_scale" in takes and out.get("true_cfg_scale", 1) <= 1:
                raise TextlocError(
                    f"{type(self.pipe).__name__} reads a negative prompt only with a true_cfg_scale above 1"
                )
            out["negative_prompt"] = [negative_prompt] * len(prompts)
        return out

    @staticmethod
    def pictures(output) -> np.ndarray:
        """The pictures, floats 0 to 1 (rows, height, width, 3), in the output of a pipeline with output type "np"."""
        for name in ("images", "image"):
            if hasattr(output, name):
                return np.asarray(getattr(output, name))
        return np.asarray(output.frames)[:, 0]  # a video with one frame

    def tokens(self, prompt: str) -> list[list[int]]:
        """The prompt's tokens from each of :attr:`tokenizers`, without truncation and padding."""
        text = self._cleaned(prompt)
        return [tokenizer(text, truncation=False, verbose=False).input_ids for tokenizer, _, _ in self.tokenizers]

    def _cleaned(self, prompt: str) -> str:
        """The prompt as the tokenizers get it. DeepFloyd IF first cleans it and makes it lower-case."""
        clean = getattr(self.pipe, "_text_preprocessing", None)
        return clean(prompt, clean_caption=True)[0] if clean else prompt

    def text_columns(self, prompt: str) -> list[tuple[int, list[tuple[int, ...]]]]:
        """The tokens at each position of the texts that the denoiser reads, in the order of the texts.

        For each text there is one tuple: (number of tokens before the padding, tokens). Each position has one token for
        each tokenizer that writes there.
        """
        text = self._cleaned(prompt)
        # Tokenizers of one kind use the same positions. The text of the long tokenizers follows after the others.
        texts = [[(t, limit) for t, limit, is_long in self.tokenizers if is_long == kind] for kind in (False, True)]
        columns = []
        for group in texts:
            if group:
                own = max(len(tokenizer(text).input_ids) for tokenizer, _ in group)
                padded = [t(text, padding="max_length", max_length=limit).input_ids for t, limit in group]
                columns.append((own, list(zip(*padded, strict=True))))
        return columns

    @contextlib.contextmanager
    def starting_from(self, noise: torch.Tensor | None, guidance: float | None = None) -> Iterator[dict]:
        """Yield the further arguments with which a pipeline call starts from ``noise`` (rows, ...), inside the block.

        Some pipelines keep the guidance scale in a component, and not in an argument. Inside the block, the scale of
        that component is ``guidance``.
        """
        own = {}
        if guidance is not None and self.architecture.guidance == "guider":
            guiders = {n: getattr(self.pipe, n, None) for n in ("guider", "ocr_guider")}
            own = {n: g.new(guidance_scale=guidance) for n, g in guiders.items() if g is not None}
        begin = {}
        if noise is not None:
            if "latents" in inspect.signature(self.pipe).parameters:  # works for stand-ins of pipelines, too
                begin = {"latents": noise}
            else:  # IFPipeline has no argument for noise; it draws the noise in a separate method
                own["prepare_intermediate_images"] = lambda *args, **kwargs: noise
        before = {n: getattr(self.pipe, n) for n in own if n in self.pipe.components}
        try:
            for n, value in own.items():
                setattr(self.pipe, n, value)
            yield begin
        finally:
            for n in own:
                if n in before:
                    setattr(self.pipe, n, before[n])
                else:
                    delattr(self.pipe, n)

    @contextlib.contextmanager
    def first_order(self) -> Iterator[None]:
        """Inside the block the pipeline samples with first-order deterministic steps, which can be inverted.

        These are Euler steps for flow matching, and DDIM steps (DPM-Solver++ of order 1) for other models. A scheduler
        that already takes such steps is kept.
        """
        before = self.pipe.scheduler
        config = before.config
        plain = isinstance(before, DDIMScheduler) and not (config.clip_sample or config.thresholding)
        if not plain and not isinstance(before, FlowMatchEulerDiscreteScheduler):
            single = {"algorithm_type": "dpmsolver++", "solver_order": 1, "final_sigmas_type": "zero"}
            # If its settings have no learned variance, IFPipeline drops the output's variance channels.
            other = {"thresholding": False, "variance_type": None}
            self.pipe.scheduler = DPMSolverMultistepScheduler.from_config(config, **single, **other)
        try:
            yield
        finally:
            self.pipe.scheduler = before

    @torch.no_grad()
    def encode(self, pictures: np.ndarray) -> torch.Tensor:
        """Encode pictures, uint8 (n, H, W, 3) of the model's size, as the denoiser's latents, or as pixels -1 to 1.

        Latents are the autoencoder's mean, shifted and scaled. They are packed into tokens if the denoiser needs this.
        """
        x = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float().div(127.5).sub(1)
        vae = getattr(self.pipe, "vae", None) or getattr(self.pipe, "vqvae", None)
        if vae is None:
            size = self.spec.stage1 or (self.spec.height, self.spec.width)
            return nn.functional.interpolate(x, size, mode="area").to(self.device)
        if not isinstance(vae, AutoencoderKL) or getattr(vae.config, "latents_mean", None) is not None:
            raise TextlocError(
                f"encoding a picture needs an AutoencoderKL without latents_mean; this model has a {type(vae).__name__}"
            )
        # Some autoencoders overflow in half precision.
        dtype, vae = vae.dtype, vae.float()
        # In float32, encoding a full-size picture takes several gigabytes.
        several = 32 if self.spec.miniature else 1
        parts = [vae.encode(part.to(self.device)).latent_dist.mode() for part in x.split(several)]
        vae.to(dtype)
        latents = (torch.cat(parts) - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor
        pack = getattr(self.pipe, "_pack_latents", None)
        return pack(latents, *latents.shape) if pack else latents

    def stage2_arguments(self, arguments: dict) -> dict:
        """Keyword arguments of stage II's call, with the prompts of the pipeline's call with ``arguments``."""
        prompts = {k: arguments[k] for k in ("prompt", "negative_prompt") if k in arguments}
        size = {"height": self.spec.height, "width": self.spec.width}
        return prompts | size | (self.spec.stage2_arguments or {})


def wrap(pipe: DiffusionPipeline | Model) -> Model:
    """Wrap a diffusers pipeline as a model, which every function of this package accepts.

    A model that is already wrapped is returned unchanged. Steps, guidance and size are the pipeline's own defaults. To
    set other values, use :meth:`Model.from_pipeline`. Raises TextlocError for a pipeline whose architecture is not
    known.

    >>> wrap(pipe)
    Model(StableDiffusionXLPipeline: StableDiffusionXLPipeline, 8 text layers, cpu)
    """
    return Model.of(pipe)


def _spec_of(pipe: DiffusionPipeline, denoiser: nn.Module, family: str) -> ModelSpec:
    """A spec for a pipeline that is not in the registry, with the defaults of the pipeline's class."""
    defaults = {k: p.default for k, p in inspect.signature(type(pipe).__call__).parameters.items()}
    row, scale = architecture(denoiser), getattr(pipe, "vae_scale_factor", 1)
    size = denoiser.config.get("sample_size") or getattr(pipe, "default_sample_size", None)
    size = (size, size) if isinstance(size, int) else size
    given = [defaults.get(n) if isinstance(defaults.get(n), int) else None for n in ("height", "width")]
    height, width = (g or (size[i] * scale if size else 1024) for i, g in enumerate(given))
    held = getattr(getattr(pipe, "guider", None), "guidance_scale", 0.0)
    guidance = held if row.guidance == "guider" else defaults[row.guidance]
    return ModelSpec(
        name=type(pipe).__name__,
        family=family,
        pipeline=type(pipe).__name__,
        source="",
        steps=defaults["num_inference_steps"],
        guidance=guidance,
        height=height,
        width=width,
        max_sequence_length=defaults.get("max_sequence_length"),
    )


def check_hookable(denoiser: nn.Module) -> None:
    """Raise TextlocError for a compiled denoiser or compiled blocks, because they ignore hooks that are added later."""
    compiled = hasattr(denoiser, "_orig_mod") or any(
        getattr(module, "_compiled_call_impl", None) is not None for module in denoiser.modules()
    )
    if compiled:
        raise TextlocError("the denoiser is compiled and ignores hooks that are added later; use it without compiling")


def as_indices(value, name: str) -> tuple[int, ...]:
    """Return one or several integers (also numpy's) as a tuple. Raises TextlocError for anything else."""
    try:
        if isinstance(value, str | bytes | bool | np.bool_):
            raise TypeError
        several = [value] if hasattr(value, "__index__") and not getattr(value, "ndim", 0) else [*value]
        if any(isinstance(v, bool | np.bool_) for v in several):
            raise TypeError
        return tuple(operator.index(v) for v in several)
    except TypeError:
        raise TextlocError(f"{name} must be an integer or integers, got {value!r}") from None


def as_integer(value, name: str) -> int:
    """Return one integer (also numpy's). Raises TextlocError for anything else."""
    found = as_indices(value, name)
    if len(found) != 1:
        raise TextlocError(f"{name} must be one integer, got {value!r}")
    return found[0]


def check_layers(model: Model | tuple[TextLayer, ...], indices) -> None:
    """Raise TextlocError unless every index is that of one of the model's text layers."""
    n = len(model.layers if isinstance(model, Model) else model)
    wrong = [i for i in as_indices(indices, "layers") if not 0 <= i < n]
    if wrong:
        raise TextlocError(f"layer {wrong[0]!r} is out of range; this model's text layers are 0 to {n - 1}")


def check_prompts(model: Model, prompts) -> None:
    """Raise TextlocError for a prompt that is longer than a tokenizer of the pipeline allows."""
    for prompt in prompts:
        for tokens, (_, limit, _) in zip(model.tokens(prompt), model.tokenizers, strict=True):
            if (count := len(tokens)) > limit:
                raise TextlocError(f"prompt of {count} tokens is too long; {model.spec.name} takes {limit}: {prompt!r}")


def check_distinct(model: Model, pairs) -> None:
    """Raise TextlocError for a pair whose two prompts have the same tokens in this model."""
    for pair in pairs:
        if (source := model.tokens(pair.source)) and source == model.tokens(pair.target):
            raise TextlocError(
                f"the prompts {pair.source!r} and {pair.target!r} have the same tokens in {model.spec.name}; its "
                f"tokenizer does not know the words that differ, choose another text"
            )
