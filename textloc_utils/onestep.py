"""Cheap localization without pictures: measure what a patch changes in one denoiser evaluation.

Take the noisy picture of the source's run at some noise level. For this picture, let v be the denoiser's guided output
with the source prompt, v' its output with the target prompt, and v(l) its output with the source prompt and layer l
patched. The one-step effect of layer l is::

    e(l) = <v(l) - v, v' - v> / |v' - v|^2

It is 0 if the patch changes nothing, and 1 if it changes as much as the target prompt does. Attribution patching
(Syed et al. 2023) estimates the effects of all layers to first order, from one backward pass.

There is also a baseline without patching. It measures, in each layer, the share of the picture's attention that goes to
the tokens in which the prompts differ.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Sequence

import pandas as pd
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from textloc_utils.generate import BATCH_FULL_SIZE, EnoughError, counted
from textloc_utils.models import (
    Model,
    TextLayer,
    attention_maps,
    check_prompts,
    guided,
    image_and_text,
    read_call,
    select_rows,
)
from textloc_utils.patching import Patch, patched
from textloc_utils.prompts import Pair
from textloc_utils.settings import TextlocError
from textloc_utils.sites import token_groups

DEPTHS = ("one-step", "attribution")
ATTENTION = "attention"  #: the baseline
LEVELS = (0.0, 0.2, 0.4)  #: noise levels, as shares of the steps that are already done


def check_depth(depth: str) -> None:
    """Raise TextlocError unless ``depth`` is one of DEPTHS or ATTENTION."""
    if depth not in (*DEPTHS, ATTENTION):
        raise TextlocError(f"unknown depth {depth!r}; allowed: {', '.join((*DEPTHS, ATTENTION))}")


def effects(
    model: Model,
    pairs: Sequence[Pair],
    *,
    depth: str = "one-step",
    levels: Sequence[float] = LEVELS,
    steps: int | None = None,
    guidance: float | None = None,
    negative_prompt: str | None = None,
) -> pd.DataFrame:
    """The effect of every text layer alone, for every pair and noise level.

    A level is the share of the steps that are done when the source's noisy picture is taken, 0 <= level < 1. ``depth``
    is one of DEPTHS, or ATTENTION, whose "effects" are shares of attention, 0 to 1.

    The table has one row per pair, level and layer. Its columns are model, seed, depth, level, layer, effect and
    row_evaluations. The last one is the number of denoiser rows of the pair, divided by the number of its rows in this
    table, so the sum of the column is the cost. A backward pass counts as two evaluations of its rows.

    Raises TextlocError if the depth is unknown, if a level is out of range, if the denoiser's outputs are not finite or
    do not differ, or if an effect is not finite.
    """
    check_depth(depth)
    if not levels or any(not 0 <= level < 1 for level in levels):
        raise TextlocError(f"levels must be shares of the steps, 0 <= level < 1, got {tuple(levels)}")
    steps = steps or model.spec.steps
    guidance = model.spec.guidance if guidance is None else guidance
    settings = {"steps": steps, "guidance": guidance, "negative_prompt": negative_prompt}
    at = {int(level * steps): level for level in levels}
    rows = []
    for pair in pairs:
        check_prompts(model, [pair.source, pair.target])
        with counted(model) as counter:
            found, backward = _pair(model, pair, at, depth, settings)
        cost = (counter.rows + 2 * backward) / (len(at) * len(model.layers))
        shared = {"model": model.spec.name, "seed": pair.seed, "depth": depth}
        for step, values in found.items():
            for layer, effect in enumerate(values):
                if not math.isfinite(effect):
                    raise TextlocError(f"the effect of layer {layer} on the pair of seed {pair.seed} is not finite")
                place = {"level": at[step], "layer": layer, "effect": effect}
                rows.append(shared | place | {"row_evaluations": cost})
    return pd.DataFrame(rows)


def _pair(model: Model, pair: Pair, at: dict[int, float], depth: str, settings: dict) -> tuple[dict, int]:
    """Run the source to the last level and probe the denoiser: effects per step, and rows of backward passes."""
    found, backward, state = {}, [0], {"calls": 0, "step": 0, "inside": False}
    # If the negatives have a separate call, the call of the prompts comes first. Only that one is probed.
    calls = 1 if model.doubled else model.evaluations(settings["guidance"])
    probe: Callable[..., tuple[list[float], int]]
    if depth == ATTENTION:
        probe = functools.partial(_attention, places=token_groups(model, pair)["different"])
    else:
        probe = _one_step if depth == "one-step" else _attribution

    def after(denoiser, args, kwargs, output):
        if state["inside"]:
            return
        state["calls"] += 1
        if (state["calls"] - 1) % calls:
            return
        if state["step"] in at:
            state["inside"] = True
            try:
                found[state["step"]], rows = probe(model, args, kwargs, settings["guidance"])
            finally:
                state["inside"] = False
            backward[0] += rows
        state["step"] += 1
        if state["step"] > max(at):
            raise EnoughError

    arguments = model.call_arguments([pair.source, pair.target], **settings)
    generators = [torch.Generator("cpu").manual_seed(pair.seed) for _ in range(2)]
    with model.denoiser.register_forward_hook(after, with_kwargs=True), contextlib.suppress(EnoughError):
        model.pipe(**arguments, generator=generators)
    return found, backward[0]


def _call(model: Model, args: tuple, kwargs: dict, texts: list[int], guidance: float) -> torch.Tensor:
    """The guided output for the source's noisy picture with the given texts, 0 for the source and 1 for the target.

    The current call has the rows [source, target], or [negative, negative, source, target] with guidance.
    """
    batch = read_call(model.denoiser, args, kwargs).rows
    halves = range(0, batch, 2)
    pictures = [half for half in halves for _ in texts]
    rows = [half + text for half in halves for text in texts]
    given = select_rows(model.denoiser, args, kwargs, pictures, rows)
    out = model.denoiser(**given | {"return_dict": False})[0]
    out = (torch.stack(out) if isinstance(out, list) else out).float()
    # A learned variance follows after the channels of the output.
    out = out[:, : given[model.architecture.sample][0].shape[0]]
    return out if batch == 2 else guided(model.denoiser, out, guidance)


def _one_step(model: Model, args: tuple, kwargs: dict, guidance: float) -> tuple[list[float], int]:
    """Evaluate the target, the source, and the source patched at every layer, in one call (large models: several)."""
    layers, effects = range(len(model.layers)), []
    size = len(layers) if model.spec.miniature else BATCH_FULL_SIZE
    for start in range(0, len(layers), size):
        part = layers[start : start + size]
        patches = [Patch(source=2 + i, target=0, layers=(layer,)) for i, layer in enumerate(part)]
        with patched(model, patches, 2 + len(part)):
            answers = _call(model, args, kwargs, [1, 0] + [0] * len(part), guidance).flatten(1).double()
        direction = answers[0] - answers[1]
        _check_direction(direction)
        effects += ((answers[2:] - answers[1]) @ direction / direction.square().sum()).tolist()
    return effects, 0


def _check_direction(direction: torch.Tensor) -> None:
    """Raise TextlocError if the target prompt changes nothing: effects are shares of its change."""
    if not direction.isfinite().all() or not direction.any():
        raise TextlocError("the denoiser's outputs for source and target are equal, or not finite; try another dtype")


@torch.enable_grad()
def _attribution(model: Model, args: tuple, kwargs: dict, guidance: float) -> tuple[list[float], int]:
    """The gradient of the source's output along the target's, times the change of each layer's keys and values."""
    outputs, added = {}, {}

    def listen(name):
        def hook(module, inputs, output):
            outputs[name] = output.detach()
            added[name] = torch.zeros_like(output, requires_grad=True)
            return output + added[name]

        return hook

    names = [
        (layer, letter, name)
        for layer in model.layers
        for letter, name in zip("kv", (layer.key, layer.value), strict=True)
    ]
    with contextlib.ExitStack() as hooks:
        for name in dict.fromkeys(name for _, _, name in names):
            hooks.enter_context(model.denoiser.get_submodule(name).register_forward_hook(listen(name)))
        target, source = _call(model, args, kwargs, [1, 0], guidance)
    direction = (target - source).detach()
    _check_direction(direction)
    # Scale to a size that half precision can hold. A factor that is a power of two changes no other bit.
    scale = 2.0 ** -math.floor(math.log2(float(direction.abs().max() / direction.square().sum())))
    along = (source * direction).sum() * (scale / direction.square().sum())
    gradients = torch.autograd.grad(along, list(added.values()))
    gradients = dict(zip(added, gradients, strict=True))
    tokens = read_call(model.denoiser, args, kwargs).tokens
    values = [0.0] * len(model.layers)
    for layer, letter, name in names:
        output, gradient = (layer.text(x, letter, tokens) for x in (outputs[name], gradients[name]))
        change = output[0::2] - output[1::2]
        values[layer.index] += float((gradient[1::2].double() * change.double()).sum()) / scale
    return values, len(outputs[names[0][2]])


def _attention(
    model: Model, args: tuple, kwargs: dict, guidance: float, *, places: tuple[int, ...]
) -> tuple[list[float], int]:
    """The share of the picture's attention to the text positions ``places`` in each layer, with the source prompt."""
    shares = _Shares(model, places)
    shares.tokens = read_call(model.denoiser, args, kwargs).tokens
    with contextlib.ExitStack() as hooks:
        for layer in model.layers:
            attention = model.denoiser.get_submodule(layer.name)
            hooks.enter_context(attention.register_forward_pre_hook(functools.partial(shares.enter, layer)))
            hooks.enter_context(attention.register_forward_hook(shares.leave, always_call=True))
        with shares:
            _call(model, args, kwargs, [0], guidance)
    if missing := [layer.name for layer in model.layers if layer.index not in shares.found]:
        raise TextlocError(f"the attention of {missing[0]} could not be recorded; use another search")
    return [shares.found[layer.index] for layer in model.layers], 0


class _Shares(TorchFunctionMode):
    """Record the text layers' share of attention to some tokens, when standard processors call torch's attention.

    The share is the mean over the picture's tokens and the heads. It is taken from the last row, which is the prompt's.
    """

    def __init__(self, model: Model, places: tuple[int, ...]):
        super().__init__()
        self.model, self.places = model, list(places)
        self.layer: TextLayer | None = None
        self.tokens = 0
        self.found: dict[int, float] = {}

    def enter(self, layer, module, args) -> None:
        self.layer = layer

    def leave(self, module, args, output) -> None:
        self.layer = None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if self.layer is not None and function is F.scaled_dot_product_attention:
            self._note(self.layer, *args, **(kwargs or {}))
        return output

    def _note(self, layer, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **other):
        pictures, texts = image_and_text(self.model.denoiser, layer, query.shape[2], key.shape[2], self.tokens)
        maps = attention_maps(query, key, [-1], pictures, attn_mask, scale)
        self.found[layer.index] = float(maps[..., texts][..., self.places].float().sum(-1).mean())
