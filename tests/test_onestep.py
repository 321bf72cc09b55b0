"""One-step effects and attribution patching against their definitions, on tiny pipelines of every family."""

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel

from textloc_utils import onestep
from textloc_utils.generate import counted
from textloc_utils.models import CROSS
from textloc_utils.prompts import Pair
from textloc_utils.settings import TextlocError
from textloc_utils.sites import token_groups

PAIR = Pair.of('A red sign that says "HELLO".', "WORLD", seed=3)


@pytest.fixture(scope="module", params=tiny.BUILDERS)
def model(request):
    built = tiny.model(request.param)
    built.pipe.to(torch.float64)
    return built


class FirstCall:
    """The first call of the denoiser while the pipeline draws source and target, to be asked again row by row."""

    def __init__(self, model):
        self.model, self.seen = model, None
        handle = model.denoiser.register_forward_pre_hook(self._keep, with_kwargs=True)
        arguments = model.call_arguments(
            [PAIR.source, PAIR.target], steps=3, guidance=model.spec.guidance, negative_prompt=None
        )
        model.pipe(**arguments, generator=[torch.Generator().manual_seed(PAIR.seed) for _ in range(2)])
        handle.remove()

    def _keep(self, denoiser, args, kwargs):
        if self.seen is None:
            names = ("sample" if isinstance(denoiser, UNet2DConditionModel) else "hidden_states", "timestep")
            self.picture, self.seen = names[0], dict(zip(names, args, strict=False)) | kwargs

    def ask(self, text, change=None):
        """(guided answer, keys and values by module name) for the source's noise and one row's text.

        ``change`` maps module names to what replaces their output: a list over the negative half and the prompt's.
        """
        rows = len(self.seen[self.picture])
        answers, stored = [], {}
        for half in range(rows // 2):
            part = {k: self._row(k, v, 2 * half + text, rows) for k, v in self.seen.items()}
            part[self.picture] = self.seen[self.picture][2 * half : 2 * half + 1]
            handles = []
            for layer in self.model.layers:
                for name in (layer.key, layer.value):
                    handles.append(self._listen(name, stored.setdefault(name, []), (change or {}).get(name), half))
            with torch.no_grad():
                out = self.model.denoiser(**part | {"return_dict": False})[0]
            for handle in handles:
                handle.remove()
            answers.append(out[:, : part[self.picture].shape[1]].flatten())
        if len(answers) == 1:
            return answers[0], stored
        return answers[0] + self.model.spec.guidance * (answers[1] - answers[0]), stored

    def _row(self, name, value, row, rows):
        if isinstance(value, dict):
            return {k: self._row(k, v, row, rows) for k, v in value.items()}
        if name in ("img_ids", "txt_ids") or not isinstance(value, torch.Tensor) or not value.ndim:
            return value
        return value[row : row + 1] if len(value) == rows else value

    def _listen(self, name, store, replacement, half):
        def hook(module, inputs, output):
            store.append(output)
            return None if replacement is None else replacement[half](output)

        return self.model.denoiser.get_submodule(name).register_forward_hook(hook)

    def text_rows(self, layer):
        return slice(None, self.seen["encoder_hidden_states"].shape[1] if layer.context else None)


def along(call, change, source, direction):
    """The share of ``direction`` that the source's answer moves by under ``change``."""
    return float((call.ask(0, change)[0] - source) @ direction / (direction @ direction))


def mixed(stored, rows, share):
    """Replaces a module's text rows by a mixture with stored ones, one function per half."""

    def half(there):
        def replace(output):
            out = output.clone()
            out[:, rows] += share * (there - output)[:, rows]
            return out

        return replace

    return [half(there) for there in stored]


def nudged(stored, own, rows, share):
    """Adds a share of the change that the unpatched run's text rows would have to make, one function per half."""

    def half(change):
        def add(output):
            out = output.clone()
            out[:, rows] += share * change[:, rows]
            return out

        return add

    return [half(there - here) for there, here in zip(stored, own, strict=True)]


def test_effects_are_what_their_definitions_say(model):
    """Against the denoiser asked row by row: the whole change for one-step, a small share of it for attribution."""
    call = FirstCall(model)
    source, own = call.ask(0)
    target, stored = call.ask(1)
    direction = target - source
    whole, first = (onestep.effects(model, [PAIR], depth=d, levels=(0.0,)).effect for d in onestep.DEPTHS)
    small = 1e-3  # larger than the rounding of norms that compute in single precision
    for layer in model.layers:
        rows, names = call.text_rows(layer), (layer.key, layer.value)
        change = {n: mixed(stored[n], rows, 1.0) for n in names}
        # The direction is summed in single precision by the package, as every answer is.
        assert whole[layer.index] == pytest.approx(along(call, change, source, direction), abs=1e-4)
        # A forward hook sees what the layers before have made of the change; the gradient takes the unchanged run.
        fixed = {n: nudged(stored[n], own[n], rows, small) for n in names}
        slope = along(call, fixed, source, direction) / small
        assert first[layer.index] == pytest.approx(slope, abs=5e-3)
    assert whole.abs().max() > 1e-2


def test_all_effects_are_found(model):
    table = onestep.effects(model, [PAIR], levels=(0.0, 0.5))
    layers = len(model.layers)
    assert list(table.layer) == [*range(layers)] * 2
    assert table.effect.notna().all() and table.effect.abs().max() > 1e-3


def test_cost_is_what_the_denoiser_was_asked(model):
    with counted(model) as counter:
        table = onestep.effects(model, [PAIR], levels=(0.0,))
    assert table.row_evaluations.sum() == pytest.approx(counter.rows)
    halves = 1 if model.spec.pipeline == "FluxPipeline" else 2
    assert counter.rows == halves * (2 + 2 + len(model.layers))


def test_mistakes_get_one_line(model):
    with pytest.raises(TextlocError, match="unknown depth 'deep'; allowed: one-step, attribution"):
        onestep.effects(model, [PAIR], depth="deep")
    with pytest.raises(TextlocError, match="0 <= level < 1"):
        onestep.effects(model, [PAIR], levels=(1.0,))


def test_attention_is_what_its_maps_say(model):
    """Against the maps of stock attention, computed here from its queries and keys."""
    table = onestep.effects(model, [PAIR], depth=onestep.ATTENTION, levels=(0.0, 0.5))
    assert list(table.layer) == [*range(len(model.layers))] * 2
    assert table.effect.between(0, 1).all() and table.effect.max() > 1e-4
    halves = 1 if model.spec.pipeline == "FluxPipeline" else 2
    with counted(model) as counter:
        onestep.effects(model, [PAIR], depth=onestep.ATTENTION, levels=(0.0,))
    assert counter.rows == halves * 3  # source and target as they are, and the source once more
    if model.layers[0].family != CROSS:
        return
    held = {}
    call = FirstCall(model)
    names = [layer.name for layer in model.layers]
    handles = [
        model.denoiser.get_submodule(f"{name}.{part}").register_forward_hook(
            lambda module, args, out, at=(name, part): held.update({at: out[-1]})  # the prompt's half comes last
        )
        for name in names
        for part in ("to_q", "to_k")
    ]
    call.ask(0)
    for handle in handles:
        handle.remove()
    places = list(token_groups(model, PAIR)["different"])
    for layer, name in zip(model.layers, names, strict=True):
        query, key = (held[name, part].unflatten(-1, (layer.heads, -1)).transpose(0, 1) for part in ("to_q", "to_k"))
        maps = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
        first = table[(table.layer == layer.index) & (table.level == 0.0)].effect.item()
        assert first == pytest.approx(float(maps[..., places].sum(-1).mean()), abs=1e-6)


@pytest.mark.parametrize("depth", onestep.DEPTHS)
@pytest.mark.parametrize("what", ["the same", "nan", "inf"])
def test_effects_that_are_no_numbers_are_refused(model, depth, what):
    """Prompts that are the same to the denoiser, and answers that are not finite: no share can be taken of those."""

    def spoil(module, args, output):
        sample = output[0]
        sample = sample * 0 + 1 if what == "the same" else sample + float(what)
        return (sample, *output[1:])

    handle = model.denoiser.register_forward_hook(spoil)
    try:
        with pytest.raises(TextlocError, match="not finite") as error:
            onestep.effects(model, [PAIR], depth=depth, steps=3)
    finally:
        handle.remove()
    assert "\n" not in str(error.value)
