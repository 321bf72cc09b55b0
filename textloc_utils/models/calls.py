"""The inputs that a pipeline gives its denoiser: argument names, rows and tokens, from the architecture's row."""

import functools
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from textloc_utils.models.architectures import ARCHITECTURES, JOINT, Architecture, TextLayer, architecture


@dataclass(frozen=True, kw_only=True)
class DenoiserCall:
    """The inputs of one denoiser call.

    ``rows`` is the size of the batch. ``tokens`` is the number of text tokens of each row. ``picture`` is the noisy
    picture, (rows, ...) or a list of rows. ``lengths`` is each row's own number of text tokens, if the positions of the
    picture's tokens depend on it.
    """

    rows: int
    timestep: torch.Tensor | float
    tokens: int
    picture: torch.Tensor | list[torch.Tensor]
    lengths: torch.Tensor | list[int] | None = None
    rising: bool = False

    @property
    def noise(self) -> torch.Tensor:
        """The noise level as a number that falls during a run, in the model's own unit."""
        time = torch.as_tensor(self.timestep)
        return -time.min() if self.rising else time.max()

    @property
    def picture_tokens(self) -> int | None:
        """Number of tokens of a picture in the form of tokens, (rows, tokens, channels). None for other pictures."""
        shape: tuple[int, ...] = getattr(self.picture, "shape", ())
        return shape[1] if len(shape) == 3 else None


@functools.cache
def _signature(denoiser_class: Any) -> inspect.Signature:
    return inspect.signature(denoiser_class.forward)


def _bound(denoiser: nn.Module, args: tuple, kwargs: dict) -> dict:
    kind: Any = type(denoiser)
    given = dict(_signature(kind).bind(denoiser, *args, **kwargs).arguments)
    given.pop("self")
    return given


def read_call(denoiser: nn.Module, args: tuple, kwargs: dict) -> DenoiserCall:
    """Read the arguments that a forward pre-hook on the denoiser gets."""
    row, given = architecture(denoiser), _bound(denoiser, args, kwargs)
    picture = given[row.sample]
    return DenoiserCall(
        rows=len(picture),
        timestep=given[row.time],
        tokens=_tokens(denoiser, row, given),
        picture=picture,
        lengths=_lengths(row, given),
        rising=row.rising,
    )


def _tokens(denoiser: nn.Module, row: Architecture, given: dict) -> int:
    tokens = 0
    for name, dimension, times in row.tokens:
        value = given.get(name)
        if isinstance(value, list):  # one tensor per row, padded by the denoiser
            tokens += times * max(part.shape[dimension] for part in value)
        elif value is not None:
            tokens += times * value.shape[dimension]
    tokens = -(-tokens // row.multiple) * row.multiple
    return tokens + (getattr(denoiser, row.registers).shape[1] if row.registers else 0)


def _lengths(row: Architecture, given: dict) -> torch.Tensor | list[int] | None:
    value = given[row.lengths] if row.lengths else None
    return [-(-len(part) // row.multiple) for part in value] if isinstance(value, list) else value


#: Arguments that hold token positions, which all rows share.
_SHARED = ("img_ids", "txt_ids", "position_ids", "text_rope_pos", "visual_rope_pos", "image_rotary_emb")
#: Arguments whose rows are their second dimension.
_SECOND = {name for row in ARCHITECTURES.values() for name in row.second}
#: Arguments that hold one row of text per picture.
_TEXTS = tuple(dict.fromkeys(row.text for row in ARCHITECTURES.values()))


def _per_row(name: str, value, rows: int) -> bool:
    """Whether an argument holds one entry for each row."""
    if isinstance(value, torch.Tensor):
        return name not in _SHARED and value.ndim > 0 and value.shape[0] == rows
    return name not in _SHARED and isinstance(value, list) and len(value) == rows


def take_rows(given: dict, rows: Sequence[int], batch: int) -> dict:
    """Take ``rows`` of the arguments of a denoiser call with ``batch`` rows. Arguments without rows are unchanged."""

    def pick(name, value):
        if isinstance(value, dict):
            return {key: pick(key, part) for key, part in value.items()}
        if name in _SECOND:
            return value[:, list(rows)]
        if not _per_row(name, value, batch):
            return value
        return [value[i] for i in rows] if isinstance(value, list) else value[list(rows)]

    return {name: pick(name, value) for name, value in given.items()}


def select_rows(
    denoiser: nn.Module,
    args: tuple,
    kwargs: dict,
    pictures: Sequence[int],
    texts: Sequence[int],
    extra: dict | None = None,
) -> dict:
    """The arguments of a denoiser call with other rows.

    Row i takes the noisy picture and its noise level from row ``pictures[i]`` of the call. It takes everything else
    that has one entry per row (texts, pooled texts, sizes) from row ``texts[i]``. ``texts`` counts the rows of the
    call first, and then those of ``extra``, which are rows of another :func:`call_rows`.
    """
    row, given = architecture(denoiser), _bound(denoiser, args, kwargs)
    # FLUX's distilled guidance also belongs to the noisy picture.
    batch, own = len(given[row.sample]), {n: given.pop(n) for n in (row.sample, row.time, "guidance") if n in given}
    joined = batch
    if extra is not None:
        joined += _count(extra)
        given |= join_rows([{n: given[n] for n in extra if n in given}, {n: extra[n] for n in extra if n in given}])
    return take_rows(given, texts, joined) | take_rows(own, pictures, batch)


def with_answer(output, answer: torch.Tensor):
    """Replace the tensor in a denoiser's output."""
    return (answer, *output[1:]) if isinstance(output, tuple) else type(output)(sample=answer)


def call_rows(denoiser: nn.Module, args: tuple, kwargs: dict) -> dict:
    """The keyword arguments of a denoiser call, without picture and timestep."""
    row, given = architecture(denoiser), _bound(denoiser, args, kwargs)
    return {k: v for k, v in given.items() if k not in (row.time, "return_dict", row.sample)}


def _count(part: dict) -> int:
    return len(next(part[name] for name in _TEXTS if part.get(name) is not None))


def join_rows(parts: Sequence[dict]) -> dict:
    """Concatenate the rows of several :func:`call_rows`."""
    sizes = [_count(part) for part in parts]

    def join(name, values):
        if isinstance(values[0], dict):
            return {key: join(key, [v[key] for v in values]) for key in values[0]}
        if name in _SECOND:
            return torch.cat(values, 1)
        if not all(_per_row(name, value, n) for value, n in zip(values, sizes, strict=True)):
            return values[0]
        return [row for part in values for row in part] if isinstance(values[0], list) else torch.cat(values)

    return {name: join(name, [part[name] for part in parts]) for name in parts[0]}


def denoise(denoiser: nn.Module, noisy: torch.Tensor, timestep: torch.Tensor, given: dict) -> torch.Tensor:
    """The output for ``noisy`` at ``timestep`` (B,), 0 to 1000, without the channels of a learned variance."""
    row = architecture(denoiser)
    time = ((1000 - timestep) if row.rising else timestep) / row.unit
    answer = denoiser(**given, **{row.sample: noisy, row.time: time}, return_dict=False)[0]
    return answer[:, : noisy.shape[1]]


def guided(denoiser: nn.Module, answer: torch.Tensor, scale: float) -> torch.Tensor:
    """The guided output from the output of a doubled batch, computed from the two halves as in the pipeline.

    In models whose guidance begins above 0 (Z-Image, Krea-2), the scaled difference is added to the prompt's output.
    """
    row = architecture(denoiser)
    first, second = answer.chunk(2)
    prompt, negative = (first, second) if row.rows == "prompts first" else (second, first)
    return (negative if row.above else prompt) + scale * (prompt - negative)


def image_and_text(denoiser: nn.Module, layer: TextLayer, queries: int, keys: int, tokens: int) -> tuple[slice, slice]:
    """The slices of a text layer's attention map, (queries, keys), for the picture's queries and the text's keys."""
    if architecture(denoiser).picture_first:
        return slice(0, queries - tokens), slice(keys - tokens, keys)
    return slice(tokens if layer.family == JOINT else 0, queries), slice(0, tokens)


def attention_maps(
    query: torch.Tensor,
    key: torch.Tensor,
    rows: list[int],
    queries: slice,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention maps, (rows, heads, queries, keys), for some rows and queries of the inputs of torch's fused attention.

    ``query`` and ``key`` are (B, heads, tokens, d). ``mask`` and ``scale`` are as in ``scaled_dot_product_attention``.
    """
    scores = query[rows][:, :, queries] @ key[rows].transpose(-1, -2) * (scale or 1 / math.sqrt(query.shape[-1]))
    if mask is not None:
        hidden = mask if mask.dtype != torch.bool else torch.where(mask, 0.0, -torch.inf)
        hidden = hidden.expand(len(query), -1, -1, -1)[rows]
        scores = scores + hidden[:, :, queries if hidden.shape[2] > 1 else slice(0, 1)]
    return scores.softmax(-1)
