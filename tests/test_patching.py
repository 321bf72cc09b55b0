"""Patching against an independent two-pass implementation, on tiny random-weight pipelines of every family."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.models.attention_processor import AttnProcessor
from two_pass import TOLERANCE, VISIBLE, assert_patched, linears, sample, two_pass

from textloc_utils import patching
from textloc_utils.generate import generate
from textloc_utils.patching import Patch, check_patches, patched
from textloc_utils.settings import TextlocError

NAMES = list(tiny.BUILDERS)
SOURCE, TARGET = 'A red sign that says "HELLO".', 'A red sign that says "WORLD".'
OTHER_SOURCE, OTHER_TARGET = 'A sign on a green wall that says "RIVER".', 'A sign on a green wall that says "STONE".'


@pytest.fixture(scope="module")
def models():
    built = {}

    def get(name, dtype=torch.float32):
        if (name, dtype) not in built:
            built[name, dtype] = tiny.model(name)
            built[name, dtype].pipe.to(dtype)
        return built[name, dtype]

    return get


@pytest.fixture
def exact(models):
    """The models in double precision: in single, batches of other sizes alone differ by about the tolerance."""
    return lambda name: models(name, torch.float64)


# --- exactness --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_layers_are_those_found_by_name(models, name):
    model = models(name)
    assert [layer.key for layer in model.layers] == [n for n, _ in linears(model, "k")]
    assert [layer.value for layer in model.layers] == [n for n, _ in linears(model, "v")]


@pytest.mark.parametrize("name", NAMES)
def test_patching_nothing_changes_no_bit(models, name):
    model = models(name)
    plain = sample(model, [SOURCE, TARGET], [7, 7])
    with patched(model, [], 2):
        nothing = sample(model, [SOURCE, TARGET], [7, 7])
    with patched(model, [Patch(source=0, target=1, layers=())], 2):
        no_layer = sample(model, [SOURCE, TARGET], [7, 7])
    with patched(model, [Patch(source=0, target=1, layers=(0,), start=2, stop=2)], 2):
        no_step = sample(model, [SOURCE, TARGET], [7, 7])
    for pictures in (nothing, no_layer, no_step):
        np.testing.assert_array_equal(pictures, plain)
    assert np.abs(plain[0] - plain[1]).mean() > VISIBLE


@pytest.mark.parametrize("name", NAMES)
def test_leaving_the_block_restores_the_pipeline(models, name):
    model = models(name)
    every = tuple(range(len(model.layers)))
    patch = Patch(source=0, target=1, layers=every, pooled=model.pooled_site is not None)
    before = sample(model, [SOURCE, TARGET], [7, 7])
    with patched(model, [patch], 2):
        inside = sample(model, [SOURCE, TARGET], [7, 7])
    np.testing.assert_array_equal(sample(model, [SOURCE, TARGET], [7, 7]), before)
    with pytest.raises(RuntimeError, match="half-way"), patched(model, [patch], 2):
        sample(model, [SOURCE, TARGET], [7, 7])
        raise RuntimeError("half-way")
    np.testing.assert_array_equal(sample(model, [SOURCE, TARGET], [7, 7]), before)
    assert np.abs(inside[0] - before[0]).mean() > VISIBLE
    np.testing.assert_array_equal(inside[1], before[1])  # the target row itself stays as it was
    for module in model.denoiser.modules():
        assert len(module._forward_hooks) == len(module._forward_pre_hooks) == 0


@pytest.mark.parametrize("name", NAMES)
def test_all_layers_and_pooled_give_the_target(models, name):
    model = models(name)
    every = tuple(range(len(model.layers)))
    pooled = model.pooled_site is not None
    with patched(model, [Patch(source=0, target=1, layers=every, pooled=pooled)], 2):
        out = sample(model, [SOURCE, TARGET], [7, 7])
    # Where the text stream evolves, its queries and its own outputs still start from the source's, but keys and
    # values of every layer are the target's, so the image stream, and with it the picture, is the target's.
    np.testing.assert_allclose(out[0], out[1], atol=TOLERANCE)
    assert np.abs(out[0] - sample(model, [SOURCE, TARGET], [7, 7])[0]).mean() > VISIBLE


# --- against the two-pass implementation ------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("name", NAMES)
def test_every_single_layer_and_all(exact, name, guidance):
    """One batch holds every choice of layers at once, all patched from one target row."""
    model = exact(name)
    n = len(model.layers)
    choices = [(i,) for i in range(n)] + [tuple(range(n))]
    last = len(choices)
    patches = [Patch(source=row, target=last, layers=layers) for row, layers in enumerate(choices)]
    with patched(model, patches, last + 1):
        out = sample(model, [SOURCE] * last + [TARGET], [7] * (last + 1), guidance)
    plain = sample(model, [SOURCE], [7], guidance)[0]
    changes = []
    for row, layers in enumerate(choices):
        reference = two_pass(model, SOURCE, TARGET, 7, layers=layers, guidance=guidance)
        assert np.abs(out[row] - reference).max() <= TOLERANCE, layers
        changes.append(np.abs(out[row] - plain).mean())
    assert changes[-1] > VISIBLE
    assert np.median(changes) > 10 * TOLERANCE


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("name", NAMES)
def test_several_pairs_in_one_batch(exact, name, guidance):
    model = exact(name)
    every = tuple(range(len(model.layers)))
    prompts, seeds = [TARGET, SOURCE, OTHER_TARGET, SOURCE, OTHER_SOURCE], [3, 3, 4, 3, 4]
    patches = [
        Patch(source=1, target=0, layers=every),
        Patch(source=3, target=0, layers=every[:1]),
        Patch(source=4, target=2, layers=every[1:]),
    ]
    with patched(model, patches, 5):
        out = sample(model, prompts, seeds, guidance)
    plain = sample(model, prompts, seeds, guidance)
    for row, source, target, seed, layers in (
        (1, SOURCE, TARGET, 3, every),
        (3, SOURCE, TARGET, 3, every[:1]),
        (4, OTHER_SOURCE, OTHER_TARGET, 4, every[1:]),
    ):
        reference = two_pass(model, source, target, seed, layers=layers, guidance=guidance)
        assert np.abs(out[row] - reference).max() <= TOLERANCE
        assert np.abs(out[row] - plain[row]).mean() > VISIBLE / 10
    np.testing.assert_array_equal(out[[0, 2]], plain[[0, 2]])


PARTS = [
    {"start": 1},
    {"start": 1, "stop": 2},
    {"heads": (1,)},
    {"heads": (1, 0)},
    {"tensors": "k"},
    {"tensors": "v"},
]


@pytest.mark.parametrize("part", PARTS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_steps_heads_and_tensors(exact, name, part):
    model = exact(name)
    every = tuple(range(len(model.layers)))
    with patched(model, [Patch(source=0, target=1, layers=every, **part)], 2):
        # Two calls in one block: the steps are counted anew in the second.
        sample(model, [SOURCE, TARGET], [8, 8])
        out = sample(model, [SOURCE, TARGET], [7, 7])[0]
    assert_patched(out, two_pass(model, SOURCE, TARGET, 7, layers=every, **part), sample(model, [SOURCE], [7])[0])
    with patched(model, [Patch(source=0, target=1, layers=every)], 2):
        whole = sample(model, [SOURCE, TARGET], [7, 7])[0]
    if set(part.get("heads", ())) != set(range(model.layers[0].heads)):
        assert np.abs(out - whole).mean() > 10 * TOLERANCE  # a part is not the whole


@pytest.mark.parametrize("part", [{"tokens": (3, 9, 6)}, {"tokens": (9, 4), "heads": (1,), "tensors": "v"}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_tokens(exact, name, part):
    """Some of the text's places, which change little in a tiny model, and exactly that."""
    model = exact(name)
    every = tuple(range(len(model.layers)))
    plain = sample(model, [SOURCE], [7])[0]
    with patched(model, [Patch(source=0, target=1, layers=every, **part)], 2):
        out = sample(model, [SOURCE, TARGET], [7, 7])[0]
    assert np.abs(out - two_pass(model, SOURCE, TARGET, 7, layers=every, **part)).max() < 1e-10
    assert np.abs(out - plain).mean() > 1e-7


@pytest.mark.parametrize("name", [n for n in NAMES if n != "ldm"])
def test_pooled_alone_and_with_a_step_range(exact, name):
    model = exact(name)
    plain = sample(model, [SOURCE], [7])[0]
    for part in ({}, {"start": 1, "stop": 2}):
        with patched(model, [Patch(source=0, target=1, pooled=True, **part)], 2):
            out = sample(model, [SOURCE, TARGET], [7, 7])[0]
        reference = two_pass(model, SOURCE, TARGET, 7, layers=(), pooled=True, **part)
        assert np.abs(out - reference).max() <= TOLERANCE
        assert np.abs(out - plain).mean() > 10 * TOLERANCE


@pytest.mark.parametrize("name", ["sdxl", "if", "sd3"])
def test_negative_prompt_takes_part(exact, name):
    model = exact(name)
    every = tuple(range(len(model.layers)))
    how = {"guidance": 4.0, "negative": "blue cloud"}
    with patched(model, [Patch(source=0, target=1, layers=every)], 2):
        out = sample(model, [SOURCE, TARGET], [7, 7], **how)[0]
    assert_patched(out, two_pass(model, SOURCE, TARGET, 7, layers=every, **how), sample(model, [SOURCE], [7], **how)[0])


def test_flux_single_blocks_leave_the_image_rows_alone(models):
    model = models("flux")
    layer = next(layer for layer in model.layers if layer.context)
    key = model.denoiser.get_submodule(layer.key)
    pairs = []
    with patched(model, [Patch(source=0, target=1, layers=(layer.index,))], 2):
        handle = key.register_forward_hook(lambda m, args, out: pairs.append((m.forward(*args), out)))
        sample(model, [SOURCE, TARGET], [7, 7])
        handle.remove()
    for before, after in pairs:
        assert torch.equal(after[0, :16], before[1, :16])
        assert torch.equal(after[0, 16:], before[0, 16:])
        assert torch.equal(after[1], before[1])
        assert not torch.equal(before[0, 16:], before[1, 16:])


def test_steps_count_noise_levels_not_calls(models):
    """FLUX with true guidance calls its denoiser twice a step, and a second pipeline call starts at step 0 again."""
    model = models("flux")
    key = model.denoiser.get_submodule(model.layers[0].key)
    copied = []
    arguments = model.call_arguments([SOURCE, TARGET], steps=3, guidance=3.5, negative_prompt=None, true_cfg_scale=2.0)
    arguments["negative_prompt"] = ["red stone", "blue cloud"]
    with patched(model, [Patch(source=0, target=1, layers=(0,), start=1, stop=2)], 2):
        handle = key.register_forward_hook(lambda m, args, out: copied.append(torch.equal(out[0], out[1])))
        model.pipe(**arguments, output_type="latent")
        model.pipe(**arguments, output_type="latent")
        handle.remove()
    assert copied == 2 * [False, False, True, True, False, False]


# --- the account of what fired ----------------------------------------------------------------------------------


def test_a_block_tells_what_fired(models):
    model = models("sd3")
    patches = [Patch(source=0, target=2, layers=1, pooled=True), Patch(source=1, target=2, layers=1)]
    with patched(model, patches, 3) as fired:
        sample(model, [SOURCE, SOURCE, TARGET], [7] * 3)
    key, value = model.layers[1].key, model.layers[1].value
    every = {0: 4, 1: 4, 2: 4}  # two rows in each half of guidance
    assert fired.steps == {key: every, value: every, model.pooled_site: {0: 2, 1: 2, 2: 2}} and fired.calls == 3
    with patched(model, Patch(source=0, target=1, layers=[0], tensors="v", start=1, stop=9), 2) as late:
        sample(model, [SOURCE, TARGET], [7, 7], 1.0)
    assert late.steps == {model.layers[0].value: {1: 1, 2: 1}}


@pytest.mark.parametrize("name", ["sd3", "flux"])
@pytest.mark.parametrize("when", ["before", "inside"])
def test_fused_projections_are_never_silent(name, when):
    model = tiny.model(name)
    if when == "before":
        model.denoiser.fuse_qkv_projections()
    with (
        pytest.raises(TextlocError, match="fused"),
        patched(model, [Patch(source=0, target=1, layers=(0,))], 2),
    ):
        model.denoiser.fuse_qkv_projections()
        sample(model, [SOURCE, TARGET], [7, 7])


def test_an_attention_that_goes_around_the_modules_is_noticed():
    model = tiny.model("sdxl")

    class Around:
        def __call__(self, attn, hidden_states, **other):
            return hidden_states

    with (
        pytest.raises(TextlocError, match="attn2.to_k took no part in the denoiser's call 1"),
        patched(model, [Patch(source=0, target=1, layers=(1,))], 2),
    ):
        model.denoiser.set_attn_processor(Around())
        sample(model, [SOURCE, TARGET], [7, 7])


def sliced(model):
    model.pipe.enable_attention_slicing(1)


def other_module(model):
    """A module of the same kind in place of one that was there when the pipeline was wrapped."""
    attention = model.denoiser.get_submodule(model.layers[0].name)
    attention.to_k = copy.deepcopy(attention.to_k)


def other_processor(model):
    model.denoiser.set_attn_processor(AttnProcessor())


def channels_last(model):
    model.pipe.unet.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("state", [sliced, other_module, other_processor, channels_last])
def test_states_in_which_the_modules_still_take_part(state):
    model = tiny.model("sdxl")
    state(model)
    with patched(model, Patch(source=0, target=1, layers="all", pooled=True), 2) as fired:
        out = sample(model, [SOURCE, TARGET], [7, 7])
    np.testing.assert_allclose(out[0], out[1], atol=TOLERANCE)
    assert all(steps == {0: 2, 1: 2, 2: 2} for steps in fired.steps.values()) and len(fired.steps) == 17


def first_block_cache(model):
    model.denoiser.enable_cache(FirstBlockCacheConfig(threshold=100.0))


def copied(model):
    """The pipeline goes on with a copy of the denoiser that was wrapped."""
    model.pipe.transformer = copy.deepcopy(model.pipe.transformer)


def without_blocks(model):
    for block in model.denoiser.single_transformer_blocks:
        block.forward = lambda hidden_states, encoder_hidden_states, **other: (encoder_hidden_states, hidden_states)


def interrupted(model):
    step = model.pipe.scheduler.step

    def stop(*args, **kwargs):
        model.pipe._interrupt = True
        return step(*args, **kwargs)

    model.pipe.scheduler.step = stop


@pytest.mark.parametrize("state", [first_block_cache, copied, without_blocks, interrupted])
def test_states_in_which_a_patch_would_do_nothing_raise(state):
    model = tiny.model("flux")
    state(model)
    patches = [Patch(source=0, target=1, layers="all"), Patch(source=0, target=1, pooled=True, start=1)]
    message = "took no part in the denoiser's call|was not called|but the run had 1 steps"
    with pytest.raises(TextlocError, match=message), patched(model, patches, 2):
        sample(model, [SOURCE, TARGET], [7, 7])


def test_a_block_without_a_call_of_the_denoiser(models):
    model, other = models("sdxl"), tiny.model("sdxl")
    with (
        pytest.raises(TextlocError, match="denoiser was not called"),
        patched(model, [Patch(source=0, target=1, layers=(1,))], 2),
    ):
        sample(other, [SOURCE, TARGET], [7, 7])
    with pytest.raises(ZeroDivisionError), patched(model, [Patch(source=0, target=1, layers=(1,))], 2):
        raise ZeroDivisionError  # the first mistake is the one to tell


def test_steps_that_never_come(models):
    with (
        pytest.raises(TextlocError, match="attn2.to_k should be patched at steps from 99 on, but the run had 3"),
        patched(models("ldm"), [Patch(source=0, target=1, layers=(0,), start=99)], 2),
    ):
        sample(models("ldm"), [SOURCE, TARGET], [7, 7])


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_several_pictures_per_prompt_are_no_guidance_halves(models, name):
    model = models(name)
    patch = Patch(source=1, target=0, layers="all")
    message = "4 rows for 2 prompts, and they are not guidance halves" if name != "flux" else "got 4; allowed: 2$"
    arguments = model.call_arguments([TARGET, SOURCE], steps=2, guidance=1.0, negative_prompt=None)
    arguments |= {"num_images_per_prompt": 2, "output_type": "np"}
    with pytest.raises(TextlocError, match=message), patched(model, patch, 2):
        model.pipe(**arguments, generator=[torch.Generator().manual_seed(7) for _ in range(4)])
    with patched(model, [Patch(source=2, target=0, layers="all", pooled=True)], 4):
        out = model.pipe(**arguments, generator=[torch.Generator().manual_seed(7) for _ in range(4)]).images
    np.testing.assert_allclose(out[2], out[0], atol=TOLERANCE)
    assert np.abs(out[3] - out[1]).mean() > VISIBLE


def test_layers_and_heads_of_many_kinds(models):
    model = models("ldm")
    for layers in (1, np.int64(1), [1], (np.int32(1),), np.array([1]), range(1, 2)):
        assert Patch(source=0, target=1, layers=layers) == Patch(source=np.int64(0), target=1, layers=(1,))
    assert Patch(source=0, target=1, layers="all").indices(model) == (0, 1, 2, 3)
    assert Patch(source=0, target=1, heads="all").heads is None
    assert Patch(source=0, target=1, tokens="all").tokens is None
    assert Patch(source=0, target=1, tokens=range(2)).tokens == (0, 1)
    assert Patch(source=0, target=1, heads=[0]).heads == Patch(source=0, target=1, heads=np.int8(0)).heads == (0,)
    for wrong in (
        {"layers": "3"},
        {"layers": 1.0},
        {"layers": [True]},
        {"layers": None},
        {"heads": "first"},
        {"tokens": 1.5},
    ):
        (name,) = wrong
        with pytest.raises(TextlocError, match=f"^{name} must be an integer or integers, got"):
            Patch(source=0, target=1, **wrong)
    for name, value in {"source": "0", "target": None, "start": 0.5, "stop": (1, 2)}.items():
        with pytest.raises(TextlocError, match=name):
            Patch(**{"source": 0, "target": 1, name: value})


@pytest.mark.parametrize(("name", "modules"), [("sdxl", ["to_k", "to_v"]), ("sd3", ["add_k_proj", "add_v_proj"])])
def test_lora_wrapped_layers(name, modules):
    peft = pytest.importorskip("peft")
    model = tiny.model(name)
    model.pipe.to(torch.float64)
    every = tuple(range(len(model.layers)))
    with patched(model, [Patch(source=0, target=1, layers=every)], 2):
        bare = sample(model, [SOURCE, TARGET], [7, 7])[0]
    model.denoiser.add_adapter(peft.LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=modules))
    with patched(model, [Patch(source=0, target=1, layers=every)], 2):
        out = sample(model, [SOURCE, TARGET], [7, 7])[0]
    assert_patched(out, two_pass(model, SOURCE, TARGET, 7, layers=every), sample(model, [SOURCE], [7])[0])
    assert np.abs(out - bare).mean() > VISIBLE  # the adapter took part


def test_outputs_held_by_others_are_not_written_to(models):
    model = models("sd3")
    layer = model.layers[0]
    held = []
    key = model.denoiser.get_submodule(layer.key)
    handle = key.register_forward_hook(lambda m, args, out: held.append((out, out.clone())))
    with patched(model, [Patch(source=0, target=1, layers=(0,))], 2):
        sample(model, [SOURCE, TARGET], [7, 7])
    handle.remove()
    assert all(torch.equal(now, then) for now, then in held)


def test_rows_that_share_steps_cost_one_copy(models):
    """A sweep's rows are gathered at once: hooks on a layer do not grow in number with the rows patched."""
    model = models("ldm")
    patches = [Patch(source=i, target=9, layers=(0,)) for i in range(9)]
    with patched(model, patches, 10):
        assert len(model.denoiser.get_submodule(model.layers[0].key)._forward_hooks) == 1
        hook = next(iter(model.denoiser.get_submodule(model.layers[0].key)._forward_hooks.values()))
        assert len(hook.copies) == 1 and hook.copies[0].sources == list(range(9))
        sample(model, [SOURCE] * 9 + [TARGET], [7] * 10)


# --- mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patches", "message"),
    [
        ([Patch(source=0, target=2, layers=(0,))], "row 2 is out of range.*0 to 1"),
        ([Patch(source=-1, target=1, layers=(0,))], "row -1 is out of range"),
        ([Patch(source=0, target=0, layers=(0,))], "row 0 is both a target and a source"),
        ([Patch(source=0, target=1, layers=(4,))], "layer 4 is out of range.*0 to 3"),
        ([Patch(source=0, target=1, layers=(0,), heads=(2,))], "heads .* out of range.*0 to 1"),
        ([Patch(source=0, target=1, layers=(0,), tensors="q")], "unknown tensors 'q'.*k, v, kv"),
        ([Patch(source=0, target=1, layers=(0,), start=2, stop=1)], "steps 2 to 1"),
        ([Patch(source=0, target=1, layers=(0,), tokens=(-1,))], "tokens .* out of range.*from 0"),
        ([Patch(source=0, target=1, pooled=True)], "no pooled text embedding"),
    ],
)
def test_mistakes_are_named_before_anything_runs(models, patches, message):
    model = models("ldm")
    with pytest.raises(TextlocError, match=message), patched(model, patches, 2):
        raise AssertionError("the block was entered")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.denoiser.modules())


def test_two_targets_for_one_place(models):
    model = models("ldm")
    one = Patch(source=0, target=1, layers=(0, 1))
    with pytest.raises(TextlocError, match="row 0 is patched from rows 1 and 2"):
        patched(model, [one, Patch(source=0, target=2, layers=(1,))], 3).__enter__()
    apart = [one, Patch(source=0, target=2, layers=(2,))]
    with patched(model, apart, 3):
        out = sample(model, [SOURCE, TARGET, OTHER_TARGET], [7] * 3)
    with patched(model, [one], 3):
        assert np.abs(out - sample(model, [SOURCE, TARGET, OTHER_TARGET], [7] * 3))[0].mean() > VISIBLE


def test_patches_of_one_row_that_meet_nowhere_are_no_conflict(models):
    model = models("ldm")
    last = model.layers[0].heads - 1
    here = {"source": 0, "layers": (0,)}
    apart = [
        ({"stop": 2}, {"start": 2}),
        ({"start": 2}, {"stop": 2}),
        ({"heads": (0,)}, {"heads": (last,)}),
        ({"tokens": (1, 2)}, {"tokens": (3,)}),
        ({"tensors": "k"}, {"tensors": "v"}),
    ]
    for one, other in apart:
        check_patches(model, [Patch(target=1, **here | one), Patch(target=2, **here | other)], 3)
    meeting = [
        ({"stop": 3}, {"start": 2}),
        ({"heads": (last,)}, {}),
        ({}, {"heads": (0,)}),
        ({"tokens": (1, 2)}, {"tokens": (2, 3)}),
        ({}, {"tokens": (3,)}),
        ({"tensors": "k"}, {}),
    ]
    for one, other in meeting:
        with pytest.raises(TextlocError, match="row 0 is patched from rows 1 and 2 at one place"):
            check_patches(model, [Patch(target=1, **here | one), Patch(target=2, **here | other)], 3)
    with pytest.raises(TextlocError, match="rows must be an integer"):
        check_patches(model, [], "3")


def batch_of(models, lengths, *, multiple=1, pairs=((0, 1),)):
    model = models("ldm")
    patches = tuple(Patch(source=a, target=b, layers=(0,)) for a, b in pairs)
    batch = patching.Batch(model, patches, 2, patching.Fired({}))
    batch.row = SimpleNamespace(multiple=multiple, masks=("mask",))
    return batch, SimpleNamespace(lengths=lengths, rows=len(lengths))


def test_texts_whose_lengths_move_the_picture_must_be_equally_long(models):
    for of in (list, torch.tensor):
        batch, call = batch_of(models, of([4, 4, 7, 7]))
        batch._check_lengths(call)
        for lengths in ([4, 5, 7, 7], [4, 4, 7, 6]):
            batch, call = batch_of(models, of(lengths))
            with pytest.raises(
                TextlocError, match="^the prompts of rows 0 and 1 have different lengths, and this model"
            ):
                batch._check_lengths(call)
        batch, call = batch_of(models, of([4, 8, 7, 7]), multiple=4)
        with pytest.raises(TextlocError, match=r"lengths \(in steps of 4 tokens\), on which"):
            batch._check_lengths(call)
        batch, call = batch_of(models, of([4, 5, 7, 7]), pairs=())
        batch._check_lengths(call)  # no row takes another one's text


def test_rows_of_masks_go_where_keys_and_values_go(models):
    batch, _ = batch_of(models, [4, 4])
    batch.size = 2
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    held = {"attention_mask": mask, "mask_of_pictures": torch.ones(5, 3), "scale": 2.0, "other_mask": None}

    def copies(letters="kv", **part):
        each = {"start": 0, "stop": None, "heads": None, "tokens": None} | part
        return [patching._Copy(**each, letter=letter, sources=[0], targets=[1]) for letter in letters]

    _, changed = patching._CopyMasks(copies(), batch)(None, (), held)
    assert torch.equal(changed["attention_mask"], mask[[1, 1]]) and torch.equal(mask[0], torch.tensor([1.0, 1.0, 0.0]))
    assert changed["mask_of_pictures"] is held["mask_of_pictures"] and changed["scale"] == 2.0
    for some in (copies("k"), copies("v"), copies(heads=(0,)), copies(tokens=(1,))):
        with pytest.raises(TextlocError, match="source and target prompt have different lengths"):
            patching._CopyMasks(some, batch)(None, (), held)
        alike = held | {"attention_mask": mask[[1, 1]]}
        assert torch.equal(patching._CopyMasks(some, batch)(None, (), alike)[1]["attention_mask"], mask[[1, 1]])
    assert patching._CopyMasks(copies(start=1), batch)(None, (), held) is None  # not at this step
    assert patching._CopyMasks(copies(), batch)(None, (), {"scale": 2.0}) is None
    with pytest.raises(TextlocError, match="the attention's attention_mask is a list"):
        patching._CopyMasks(copies(), batch)(None, (), {"attention_mask": [1, 2]})


def test_a_place_beyond_the_text_is_refused(models):
    model = models("ldm")
    with (
        pytest.raises(TextlocError, match=r"tokens \(99,\) are out of range; this text has places 0 to \d"),
        patched(model, Patch(source=0, target=1, layers=(0,), tokens=99), 2),
    ):
        sample(model, [SOURCE, TARGET], [7, 7])


def test_a_batch_of_another_size_is_refused(models):
    model = models("ldm")
    with (
        pytest.raises(TextlocError, match="made for 2 rows, but the denoiser got 6; allowed: 2 .* or 4"),
        patched(model, [Patch(source=0, target=1, layers=(0,))], 2),
    ):
        sample(model, [SOURCE, TARGET, SOURCE], [7] * 3)


def test_generate_carries_patches(models):
    model = models("sd3")
    patch = Patch(source=0, target=1, layers=(0, 1, 2))
    made = generate(model, [SOURCE, TARGET], [7, 7], patches=[patch], batch_size=1)
    with patched(model, [patch], 2):
        expected = sample(model, [SOURCE, TARGET], [7, 7])
    np.testing.assert_array_equal(made.images, np.rint(expected * 255).astype(np.uint8))
