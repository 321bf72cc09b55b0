"""Whatever state a pipeline is in, a guarded call keeps the toxic text out or returns no picture."""

import copy

import numpy as np
import pytest
import tiny
import torch
from accelerate import cpu_offload
from diffusers import (
    EulerDiscreteScheduler,
    FirstBlockCacheConfig,
    HeunDiscreteScheduler,
    PyramidAttentionBroadcastConfig,
)
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from textloc_utils import safety
from textloc_utils.safety import detector
from textloc_utils.safety.detector import Finding
from textloc_utils.settings import TextlocError

TOXIC, HARMLESS = 'A red sign that says "river"', 'A blue sign that says "stone"'
LAYERS = (1, 2)
REFUSED = "refused"


def find(prompt: str) -> list[Finding]:
    at = prompt.find("river")
    return [Finding(start=at, end=at + 5, text="river", word="river")] if at >= 0 else []


@pytest.fixture(autouse=True)
def world(monkeypatch):
    monkeypatch.setattr(detector, "HARMLESS", ("world",))


def draw(call, prompts=(TOXIC, HARMLESS), size=16, **options) -> np.ndarray:
    options = {"num_inference_steps": 3, "guidance_scale": 4.0, "height": size, "width": size} | options
    noise = [torch.Generator().manual_seed(s) for s in range(len(prompts) * options.get("num_images_per_prompt", 1))]
    return call(list(prompts), generator=noise, output_type="np", **options).images


def denoiser(pipe) -> nn.Module:
    return getattr(pipe, "transformer", None) or pipe.unet


def part(pipe) -> str:
    return "transformer" if hasattr(pipe, "transformer") else "unet"


# --- what is done to a pipeline -------------------------------------------------------------------------------


def fused(pipe):
    pipe.fuse_qkv_projections() if hasattr(pipe, "fuse_qkv_projections") else pipe.transformer.fuse_qkv_projections()


def compiled(pipe):
    setattr(pipe, part(pipe), torch.compile(denoiser(pipe), backend="eager"))


def compiled_in_place(pipe):
    denoiser(pipe).compile(backend="eager")


def blocks_compiled(pipe):
    for block in denoiser(pipe).transformer_blocks if part(pipe) == "transformer" else [denoiser(pipe).mid_block]:
        block.compile(backend="eager")


def older_processors(pipe):
    pipe.unet.set_attn_processor(AttnProcessor())


class Bypassing:
    """Computes text keys and values from the weights, without the modules that hooks are on."""

    def __init__(self, kept):
        self.kept = kept

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        other = {"attention_mask": attention_mask, "image_rotary_emb": image_rotary_emb}
        other = {name: value for name, value in other.items() if value is not None}
        names = [
            n for n in ("add_k_proj", "add_v_proj", "to_k", "to_v") if isinstance(getattr(attn, n, None), nn.Linear)
        ]
        modules = {name: attn._modules[name] for name in names}
        try:
            attn._modules |= {name: _Plain(module) for name, module in modules.items()}
            return self.kept(attn, hidden_states, encoder_hidden_states, **other)
        finally:
            attn._modules |= modules


class _Plain(nn.Module):
    """A Linear module's weights in another module."""

    def __init__(self, linear):
        super().__init__()
        self.weights = linear.weight, linear.bias

    def forward(self, x):
        return F.linear(x, *self.weights)


def bypassing_processors(pipe):
    for module in denoiser(pipe).modules():
        if hasattr(module, "set_processor"):
            module.set_processor(Bypassing(module.processor))


def sliced(pipe):
    pipe.enable_attention_slicing()


def offloaded(pipe):
    cpu_offload(denoiser(pipe), execution_device="cpu")


def cast(pipe):
    denoiser(pipe).enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def with_adapter(pipe):
    names = ["to_k", "to_v"] if part(pipe) == "unet" else ["add_k_proj", "add_v_proj"]
    denoiser(pipe).add_adapter(LoraConfig(r=2, target_modules=names))


def wrapped_by_peft(pipe):
    names = ["to_k", "to_v"] if part(pipe) == "unet" else ["add_k_proj", "add_v_proj"]
    setattr(pipe, part(pipe), get_peft_model(denoiser(pipe), LoraConfig(r=2, target_modules=names)))


def replaced(pipe):
    setattr(pipe, part(pipe), copy.deepcopy(denoiser(pipe)))


class Around(nn.Module):
    """Calls another module's forward, past its hooks."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args, **kwargs):
        return self.inner.forward(*args, **kwargs)


def wrapped(pipe):
    setattr(pipe, part(pipe), Around(denoiser(pipe)))


def every_second_answer_kept(pipe):
    inner, calls = denoiser(pipe), []
    forward = inner.forward

    def cached(*args, **kwargs):
        calls.append(calls[-1] if len(calls) % 2 else forward(*args, **kwargs))
        return calls[-1]

    inner.forward = cached


def blocks_cached(pipe):
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))


def attention_cached(pipe):
    pipe.transformer.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(0, 10_000),
            spatial_attention_block_identifiers=("transformer_blocks",),
            current_timestep_callback=lambda: 500,
        )
    )


def other_scheduler(pipe):
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)


def two_calls_per_step(pipe):
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)


#: State to what comes of it: the guarded picture, or no picture. On which tiny pipelines.
STATES = {
    fused: {"sd3": REFUSED, "flux": REFUSED, "sdxl": "same"},
    compiled: {"sd3": REFUSED, "sdxl": REFUSED},
    compiled_in_place: {"sd3": REFUSED, "sdxl": REFUSED},
    blocks_compiled: {"sd3": REFUSED, "sdxl": REFUSED},
    older_processors: {"sdxl": "same"},
    bypassing_processors: {"sd3": REFUSED, "flux": REFUSED, "sdxl": "same"},
    sliced: {"sd3": "same", "sdxl": "same"},
    offloaded: {"sd3": "same", "sdxl": "same"},
    cast: {"sd3": "drawn", "sdxl": "drawn"},
    with_adapter: {"sd3": "same", "sdxl": "same"},
    wrapped_by_peft: {"sd3": REFUSED, "sdxl": REFUSED},
    replaced: {"sd3": REFUSED, "sdxl": REFUSED},
    wrapped: {"sd3": REFUSED, "sdxl": REFUSED},
    every_second_answer_kept: {"sd3": REFUSED, "sdxl": REFUSED},
    blocks_cached: {"flux": REFUSED},
    attention_cached: {"flux": REFUSED},
    other_scheduler: {"sdxl": "drawn"},
    two_calls_per_step: {"sdxl": "drawn"},
}
CASES = [(state, name, outcome) for state, named in STATES.items() for name, outcome in named.items()]


def check(guarded, outcome, wanted, plain, drawn=draw):
    if outcome == REFUSED:
        with pytest.raises(TextlocError) as raised:
            drawn(guarded)
        assert "\n" not in str(raised.value)
        return
    seen = drawn(guarded)
    assert np.abs(seen[0] - plain[0]).max() > 1e-3, "the toxic text was drawn"
    if outcome == "same":
        np.testing.assert_allclose(seen, wanted, atol=1e-4)


@pytest.mark.parametrize("state, name, outcome", CASES, ids=[f"{s.__name__}-{n}" for s, n, _ in CASES])
def test_a_state_that_a_guarded_pipeline_is_brought_into(state, name, outcome):
    guarded = safety.guard(tiny.BUILDERS[name](), LAYERS, detector=find)
    wanted = draw(guarded)
    state(guarded._inner.pipe)
    plain = draw(guarded._inner.pipe)
    check(guarded, outcome, wanted, plain)


@pytest.mark.parametrize(
    "state, name, outcome",
    [c for c in CASES if c[0] not in (replaced, wrapped_by_peft)],
    ids=[f"{s.__name__}-{n}" for s, n, _ in CASES if s not in (replaced, wrapped_by_peft)],
)
def test_a_state_that_a_pipeline_is_in_before_it_is_guarded(state, name, outcome):
    pipe = tiny.BUILDERS[name]()
    wanted = draw(safety.guard(pipe, LAYERS, detector=find))
    state(pipe)
    plain = draw(pipe)

    def guarded(*args, **kwargs):  # the refusal may come with either
        return safety.guard(pipe, LAYERS, detector=find)(*args, **kwargs)

    check(guarded, outcome, wanted, plain)


# --- what happens during a call -------------------------------------------------------------------------------


def at_step(change):
    def callback(pipe, step, timestep, values):
        if step == 0:
            return change(pipe, values) or values
        return values

    return callback


def unguided(pipe, values):
    pipe._guidance_scale = 0.0
    halves = {n: values[n].chunk(2)[-1] for n in values if n.startswith(("prompt_embeds", "add_", "pooled"))}
    return values | halves


@pytest.mark.parametrize("name", ("sd3", "sdxl"))
@pytest.mark.parametrize("change", (fused, replaced, wrapped, every_second_answer_kept))
def test_a_change_in_the_middle_of_a_call(name, change):
    guarded = safety.guard(tiny.BUILDERS[name](), LAYERS, detector=find)
    callback = at_step(lambda pipe, values: change(pipe))
    if name == "sdxl" and change is fused:  # the text goes into the attention module, fused or not
        plain = draw(guarded._inner.pipe)
        check(guarded, "drawn", None, plain, lambda call: draw(call, callback_on_step_end=callback))
        return
    with pytest.raises(TextlocError):
        draw(guarded, callback_on_step_end=callback)


def test_guidance_may_end_in_the_middle_of_a_call():
    guarded = safety.guard(tiny.BUILDERS["sdxl"](), LAYERS, detector=find)
    options = {
        "callback_on_step_end": at_step(unguided),
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds", "add_text_embeds", "add_time_ids"],
    }
    seen, plain = draw(guarded, **options), draw(guarded._inner.pipe, **options)
    assert np.abs(seen[0] - plain[0]).max() > 1e-3 and np.array_equal(seen[1], plain[1])


@pytest.mark.parametrize("name", ("sd3", "sdxl", "flux", "if"))
@pytest.mark.parametrize("guidance", (1.0, 4.0))
@pytest.mark.parametrize("copies", (1, 2, 3))
def test_copies_with_and_without_guidance(name, guidance, copies):
    guarded = safety.guard(tiny.BUILDERS[name](), LAYERS, detector=find)
    options = {"num_images_per_prompt": copies, "guidance_scale": guidance}
    seen, plain = draw(guarded, **options), draw(guarded._inner.pipe, **options)
    changed = np.abs(seen - plain).max((1, 2, 3))
    assert changed[:copies].min() > 1e-3 and changed[copies:].max() < 1e-4


def test_rows_that_are_not_the_prompts_are_refused():
    """A pipeline that turns the order of its prompts round, or draws more than it says."""
    pipe = tiny.BUILDERS["sd3"]()
    encode = pipe.encode_prompt

    def turned(*args, **kwargs):
        texts = encode(*args, **kwargs)
        return tuple(x if x is None or not turned.on else x.flip(0) for x in texts)

    turned.on, pipe.encode_prompt = False, turned
    guarded = safety.guard(pipe, LAYERS, detector=find)
    draw(guarded)
    screened = guarded._encode

    def encode_then_turn(*args):
        found = screened(*args)
        turned.on = True
        return found

    object.__setattr__(guarded, "_encode", encode_then_turn)
    with pytest.raises(TextlocError, match="not those of the prompts"):
        draw(guarded)


def test_the_account_says_where_on_how_many_rows_and_when():
    guarded = safety.guard(tiny.BUILDERS["sd3"](), LAYERS, detector=find)
    draw(guarded, [HARMLESS])
    assert guarded.fired is None
    draw(guarded, [TOXIC, HARMLESS, TOXIC])
    sites = {f"transformer_blocks.{i}.attn.add_{letter}_proj" for i in LAYERS for letter in "kv"}
    assert guarded.fired.steps == {site: {0: 2, 1: 2, 2: 2} for site in sites}
