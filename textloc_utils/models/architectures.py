"""The table of architectures: where each denoiser class reads text. Each class has one row.

The rows are in ``architectures.toml``. To add an architecture, add a row. It names the attention modules that read
text, the Linear modules whose outputs are the text's keys and values, which tokens of these outputs are text, and how
the pipeline calls the denoiser. A row is correct if it passes the tests in ``tests/test_families.py``: after all layers
of one batch row are patched from another, both pictures are exactly equal, and no token of the picture was changed.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import nn

from textloc_utils.settings import TextlocError

CROSS, ADDED, JOINT = "cross-attention U-Net", "added-KV U-Net", "joint attention"
CROSS_TRANSFORMER = "cross-attention transformer"
#: Values of ``TextLayer.context`` for layers whose Linear modules take text and image tokens together.
TEXT_FIRST, TEXT_LAST = "text rows first", "text rows last"


@dataclass(frozen=True, kw_only=True)
class TextLayer:
    """One attention layer that reads text.

    ``index`` counts from 0 in execution order (down, middle, up). ``name``, ``key`` and ``value`` are dotted names
    inside the denoiser. ``name`` is the attention module. ``key`` and ``value`` are the Linear modules whose outputs,
    (batch, tokens, heads x dimension), hold the text's keys and values. ``context`` is None if every token of these
    outputs is text. It is TEXT_FIRST if image tokens follow the text (FLUX single blocks), and TEXT_LAST if they come
    before it. If one Linear module computes more than the keys or the values, ``columns`` holds the (start, end) of
    keys "k" and values "v" in its output.
    """

    index: int
    name: str
    key: str
    value: str
    heads: int
    context: str | None = None
    columns: dict[str, tuple[int, int]] | None = None
    family: str = JOINT

    def text(self, output: torch.Tensor, letter: str, tokens: int) -> torch.Tensor:
        """The text's keys ("k") or values ("v") as a view of the output of a Linear module of this layer.

        ``tokens`` is the number of text tokens of the call (``DenoiserCall.tokens``).
        """
        if self.context == TEXT_FIRST:
            output = output[:, :tokens]
        elif self.context == TEXT_LAST:
            output = output[:, output.shape[1] - tokens :]
        return output if self.columns is None else output[..., slice(*self.columns[letter])]


@dataclass(frozen=True)
class Site:
    """Attention modules that read text: a pattern of their dotted names, and the names of their Linear modules.

    ``context`` is as in :class:`TextLayer`. ``columns`` are the (start, end) of keys and values as multiples of the
    attention's ``inner_dim``. ``needs`` is the name of an attribute that is true only in these modules.
    """

    at: str
    key: str = "to_k"
    value: str = "to_v"
    context: str | None = None
    columns: tuple[tuple[int, int], tuple[int, int]] | None = None
    needs: str | None = None
    family: str = JOINT


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How a denoiser class reads text and is called.

    Attributes
    ----------
    sites
        The attention modules that read text, in execution order.
    pooled
        Dotted name of the module whose output rows, (batch, dimension), carry the pooled text.
    sample, time, text
        Names of the arguments that hold the noisy picture, the noise level, and one row of text per picture.
    tokens
        (argument, its dimension, factor) of every argument that contributes text tokens to a row.
    registers
        Attribute of the denoiser. Its second dimension is the number of tokens that the denoiser puts before the text.
    multiple
        The text is padded to a multiple of this number of tokens.
    lengths
        Argument with each row's own number of tokens, if the positions of the picture's tokens depend on it. In such a
        model, rows of different lengths cannot be patched into each other.
    second
        Arguments whose second dimension is the batch.
    masks
        Parts of names. An argument of the attention module masks the text if its name contains one of them.
    picture_first
        Whether joint attention puts the picture's tokens before the text's tokens.
    unit, rising
        ``unit`` is the number by which a noise level of 1000 is divided. ``rising`` says whether the noise level rises
        during a run, because the model uses 1 minus the noise.
    rows
        The effect of guidance. "doubled": one call with [negatives, prompts]. "prompts first": one call with [prompts,
        negatives]. "twice": a separate call for the negatives.
    guidance
        The pipeline's argument for the guidance scale. "true_cfg_scale" also needs a negative prompt. "guider" is a
        component that holds the scale.
    told
        Whether guidance_scale is always passed to the denoiser as a number (FLUX), for all versions of the model.
    above
        The scale above which guidance is used.
    call
        Further arguments of every pipeline call. Without them, the pipeline would rewrite or cache texts, or change
        sizes.
    long
        The tokenizers whose length is the pipeline's ``max_sequence_length``.
    pooling
        The tokenizers that give only the pooled text. They may cut a prompt.
    """

    sites: tuple[Site, ...]
    pooled: str | None = None
    sample: str = "hidden_states"
    time: str = "timestep"
    text: str = "encoder_hidden_states"
    tokens: tuple[tuple[str, int, int], ...] = (("encoder_hidden_states", 1, 1),)
    registers: str | None = None
    multiple: int = 1
    lengths: str | None = None
    second: tuple[str, ...] = ()
    masks: tuple[str, ...] = ("mask",)
    picture_first: bool = False
    unit: float = 1.0
    rising: bool = False
    rows: str = "twice"
    guidance: str = "guidance_scale"
    told: bool = False
    above: float = 1.0
    call: dict = field(default_factory=dict)
    long: tuple[str, ...] = ("tokenizer",)
    pooling: tuple[str, ...] = ()


def with_tuples(table: Mapping) -> dict:
    """Replace all lists of a table, including nested ones, by tuples."""

    def read(value):
        return tuple(map(read, value)) if isinstance(value, list) else value

    return {key: read(value) for key, value in table.items()}


def _row(sites: list[dict], **others) -> Architecture:
    return Architecture(sites=tuple(Site(**with_tuples(site)) for site in sites), **with_tuples(others))


_TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
#: Class name of a denoiser or pipeline to the reason why it is not supported.
REFUSED: dict[str, str] = _TABLE.pop("refused")
#: Class name of a denoiser to its row.
ARCHITECTURES = {name: _row(**row) for name, row in _TABLE.items()}


def architecture(denoiser: nn.Module | str) -> Architecture:
    """The row of a denoiser, or of the name of its class. Raises TextlocError if there is no row."""
    names = [denoiser] if isinstance(denoiser, str) else [c.__name__ for c in type(denoiser).__mro__]
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
        if name in REFUSED:
            raise TextlocError(f"{name} cannot be patched: {REFUSED[name]}")
    raise TextlocError(f"{names[0]} has no known text layers; known classes: {', '.join(ARCHITECTURES)}")


def text_layers(denoiser: nn.Module) -> tuple[TextLayer, ...]:
    """The layers of a denoiser that read text, in execution order.

    Attention over image tokens alone is left out (``attn1`` of U-Nets, ``attn2`` of SD3.5's dual blocks). Raises
    TextlocError for an unknown denoiser, or for one that reads no text.
    """
    modules, taken = list(denoiser.named_modules()), set()
    found: list[TextLayer] = []
    for site in architecture(denoiser).sites:
        for name, module in modules:
            linear = isinstance(getattr(module, site.key, None), nn.Module)
            if not linear or name in taken or not fnmatchcase(name, site.at):
                continue
            if site.needs and not getattr(module, site.needs, False):
                continue
            taken.add(name)
            columns = site.columns and {
                letter: (start * module.inner_dim, end * module.inner_dim)
                for letter, (start, end) in zip("kv", site.columns, strict=True)
            }
            found.append(
                TextLayer(
                    index=len(found),
                    name=name,
                    key=f"{name}.{site.key}",
                    value=f"{name}.{site.value}",
                    heads=_heads(module),
                    context=site.context,
                    columns=columns,
                    family=site.family,
                )
            )
    if not found:
        raise TextlocError(f"this {type(denoiser).__name__} has no text layers: it does not read text")
    return tuple(found)


def _heads(attention: nn.Module) -> int:
    """Number of heads of keys and values. In grouped attention, there are fewer of them than heads of queries."""
    return next(
        heads
        for heads in (getattr(attention, name, None) for name in ("num_kv_heads", "heads", "num_heads"))
        if isinstance(heads, int)
    )


def family_of(layers: tuple[TextLayer, ...]) -> str:
    """The family to which a denoiser's text layers belong."""
    return layers[0].family


def pooled_site(denoiser: nn.Module) -> str | None:
    """Dotted name of the module whose output rows, (batch, dimension), carry the pooled text. None if there is none."""
    name, found = architecture(denoiser).pooled, denoiser
    for part in name.split(".") if name else ():
        found = getattr(found, part, None)
    return name if found is not None else None


def key_value_numbers(denoiser: nn.Module, layer: TextLayer) -> int:
    """Number of the denoiser's parameters that compute a layer's text keys and values."""

    def count(name: str, letter: str) -> int:
        module = denoiser.get_submodule(name)
        numbers = sum(p.numel() for p in module.parameters())
        if layer.columns is None:
            return numbers
        start, end = layer.columns[letter]
        return numbers // module.out_features * (end - start)

    return count(layer.key, "k") + count(layer.value, "v")


# --- places for adapters ----------------------------------------------------------------------------------------

#: Linear modules of a text layer that can carry an adapter. In joint attention, ``q`` to ``out`` belong to the picture,
#: and ``text_q`` to ``text_out`` belong to the text stream. In other families, ``k`` and ``v`` read the text.
PROJECTIONS = ("q", "k", "v", "out", "text_q", "text_k", "text_v", "text_out")


def projections(denoiser: nn.Module, layer: TextLayer) -> dict[str, str]:
    """Map names in PROJECTIONS to dotted names of a text layer's Linear modules, for those that it has and uses."""
    attention = denoiser.get_submodule(layer.name)
    names = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
    key, value = (name.rsplit(".", 1)[1] for name in (layer.key, layer.value))
    if layer.family == JOINT and key != "to_k":
        names |= {"text_k": key, "text_v": value}
        # In the last block, the text is only read: it has no queries and no output.
        if getattr(attention, "context_pre_only", None) is False:
            names |= {"text_q": "add_q_proj", "text_out": "to_add_out"}
    elif layer.family != JOINT:
        names |= {"q": key.replace("k", "q", 1) if key != "add_k_proj" else "to_q", "k": key, "v": value}
    paths = {name: f"{layer.name}.{names[name]}" for name in PROJECTIONS if name in names}
    return {name: path for name, path in paths.items() if _is_linear(denoiser, path)}


def self_attention(denoiser: nn.Module) -> list[str]:
    """Dotted names of the Linear modules of the picture's self-attention, without those of text layers."""
    from diffusers.models.attention_processor import Attention

    read = {name for layer in text_layers(denoiser) for name in projections(denoiser, layer).values()}
    found: list[str] = []
    for name, module in denoiser.named_modules():
        if isinstance(module, Attention):
            found += [f"{name}.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")]
    return [name for name in found if name not in read and _is_linear(denoiser, name)]


def _is_linear(denoiser: nn.Module, name: str) -> bool:
    try:
        return isinstance(denoiser.get_submodule(name), nn.Linear)
    except AttributeError:
        return False
