"""Every architecture of the table on a tiny pipeline: patching all layers gives the other row's picture, exactly.

Two rows share their noise; with the other row's text keys and values in all layers, and its pooled text, a row must
become the other one to the bit. That fails for a layer left out, text rows missed, a mask that stayed behind or a step
miscounted. It does not see too much being copied: that no token of the picture is touched is tested beside it.
"""

import diffusers
import families
import pytest
import tiny
import torch

from textloc_utils import models, onestep
from textloc_utils.patching import Patch, patched
from textloc_utils.prompts import Pair
from textloc_utils.settings import TextlocError

SOURCE, TARGET = 'A red sign that says "HELLO".', 'A red sign that says "WORLD".'
LONGER = 'A blue sign on a green wall that says "STONE river".'
#: Their pictures' places hang on the number of text tokens: only prompts of one length can be patched.
ONE_LENGTH = ("ernie",)


@pytest.fixture(scope="module")
def get():
    built = {}
    return lambda name: built.setdefault(name, families.model(name)) if name not in built else built[name]


def latents(model, prompts, guidance, seeds=(), **other):
    """What the pipeline draws for prompts, of one noise without ``seeds``, before any autoencoder: (rows, ...)."""
    arguments = model.call_arguments(prompts, steps=3, guidance=guidance, negative_prompt=None) | other
    generators = [torch.Generator().manual_seed(s) for s in seeds or [7] * len(prompts)]
    with model.starting_from(None, guidance):
        out = model.pipe(**arguments, generator=generators, output_type="latent", return_dict=False)[0]
    return torch.stack(list(out))


def scales(model):
    """A scale without negatives and one with them, where they cost further rows."""
    return [s for s in (model.architecture.above, 4.0) if s == 4.0 or model.evaluations(s) != model.evaluations(4.0)]


@pytest.mark.parametrize("name", families.BUILDERS)
def test_all_layers_give_the_other_rows_picture(get, name):
    """Prompts of one length and of two, several pairs per batch, a later start, one layer; guided and not."""
    model = get(name)
    longer = TARGET if name in ONE_LENGTH else LONGER
    pooled = model.pooled_site is not None
    prompts = [TARGET, SOURCE, longer, SOURCE, SOURCE, SOURCE]
    patches = [
        Patch(source=1, target=0, layers="all", pooled=pooled),
        Patch(source=3, target=2, layers="all", pooled=pooled),
        Patch(source=4, target=0, layers="all", pooled=pooled, start=1),
        Patch(source=5, target=2, layers=0),
    ]
    for scale in scales(model):
        plain = latents(model, prompts, scale)
        with patched(model, patches, 6) as fired:
            out = latents(model, prompts, scale)
        assert plain.isfinite().all()
        assert torch.equal(out[1], out[0]) and torch.equal(out[3], out[2])
        assert torch.equal(out[[0, 2]], plain[[0, 2]])  # what gives is left as it was
        for row, others in {1: [plain[1]], 3: [plain[3]], 4: [plain[4], out[0]], 5: [plain[5], out[2]]}.items():
            assert all((out[row] - other).abs().mean() > 1e-6 for other in others), row
        times = model.evaluations(scale)
        first, last = model.layers[0], model.layers[-1]
        assert fired.steps[first.key][0] % (3 * times) == 0 and fired.calls == 3 * (1 if model.doubled else times)
        assert {step: rows // times for step, rows in fired.steps[last.value].items()} == {0: 2, 1: 3, 2: 3}
        with patched(model, patches[0], 2):
            alone = latents(model, [TARGET, SOURCE], scale)  # of one length: none is padded
        assert torch.equal(alone[1], alone[0])


@pytest.mark.parametrize("name", families.BUILDERS)
def test_no_token_of_the_picture_is_touched(get, name):
    model = get(name)
    longer = TARGET if name in ONE_LENGTH else LONGER
    seen, tokens = {}, []

    def listen(site):
        def hook(module, args, out):
            seen.setdefault(site, (module.forward(*args), out))

        return hook

    watch = model.denoiser.register_forward_pre_hook(
        lambda m, a, k: tokens.append(models.read_call(m, a, k)), with_kwargs=True
    )
    handles = [watch]
    with patched(model, Patch(source=0, target=1, layers="all"), 2):
        for layer in model.layers:
            for site in {layer.key, layer.value}:
                handles.append(model.denoiser.get_submodule(site).register_forward_hook(listen(site)))
        latents(model, [SOURCE, longer], scales(model)[0], seeds=(7, 8))
    for handle in handles:
        handle.remove()
    call = tokens[0]
    for layer in model.layers:
        for letter, site in (("k", layer.key), ("v", layer.value)):
            before, after = seen[site]
            expected = before.clone()
            letters = "kv" if layer.key == layer.value else letter
            for each in letters:
                layer.text(expected, each, call.tokens)[0] = layer.text(before, each, call.tokens)[1]
            assert torch.equal(after, expected)
            if layer.context is not None:
                assert before.shape[1] - call.tokens == PICTURE.get(name, 16)
                image = slice(call.tokens, None) if layer.context == models.TEXT_FIRST else slice(-call.tokens)
                assert torch.equal(after[0, image], before[0, image])
                assert not torch.equal(before[0, image], before[1, image])
            elif layer.family == models.JOINT:
                assert before.shape[1] == call.tokens


#: Tokens of the picture, where they are not 4 x 4: padded, or 8 x 8.
PICTURE = {"z_image": 32, "hunyuan_image": 64, "ernie": 64}


def test_every_row_of_the_table_has_a_pipeline_here(get):
    here = {type(get(name).denoiser).__name__ for name in families.BUILDERS}
    here |= {type(tiny.model(name).denoiser).__name__ for name in tiny.BUILDERS}
    assert here == set(models.ARCHITECTURES)


@pytest.mark.parametrize("name", ["flux2", "qwen_image", "z_image", "krea_2", "pixart_sigma"])
@pytest.mark.parametrize("depth", onestep.DEPTHS)
def test_cheap_depths(get, name, depth):
    """Fused maps, negatives in a call of their own, lists of rows, heads of grouped attention, learned variance."""
    model, pair = get(name), Pair.of(SOURCE, "WORLD", seed=3)
    table = onestep.effects(model, [pair], depth=depth, levels=(0.0, 0.4))
    assert list(table.layer) == [*range(len(model.layers))] * 2
    first = table.effect[table.level == 0.0].abs()
    assert table.effect.notna().all() and (first > 1e-6).all() and first.max() > 1e-3


# --- what cannot be patched is refused --------------------------------------------------------------------------


def refuses(model, target, message, part=None, **call):
    patch = Patch(source=0, target=1, layers="all", **part or {})
    with pytest.raises(TextlocError, match=message), patched(model, patch, 2):
        latents(model, [SOURCE, target], 4.0, **call)


@pytest.mark.parametrize("name", models.REFUSED)
def test_architectures_that_stay_out_are_refused_with_the_reason(name):
    with pytest.raises(TextlocError, match=f"^{name} cannot be patched: "):
        models.architecture(name)


def test_texts_of_other_lengths_where_the_picture_depends_on_them(get):
    refuses(get("ernie"), LONGER, "rows 0 and 1 have different lengths, and this model's picture depends on the length")
    # Padded to a multiple of 32: what is within it is of one length.
    much = "red sign on a blue wall that says " * 4 + '"HELLO".'
    refuses(get("z_image"), much, r"different lengths \(in steps of 32 tokens\)")


def test_cached_text_is_refused(get):
    refuses(get("qwen_image_21"), TARGET, "without a cache of keys and values", use_kv_cache=True)


def test_parts_of_a_patch_between_masked_texts_of_other_lengths(get):
    model = get("qwen_image")
    for part in ({"tensors": "k"}, {"heads": 0}):
        with patched(model, Patch(source=0, target=1, layers="all", **part), 2):
            latents(model, [SOURCE, TARGET], 4.0)  # of one length: no mask
        refuses(model, LONGER, "heads or tokens, or keys or values alone, cannot be patched", part)


def test_heads_of_grouped_attention_are_those_of_keys(get):
    assert {layer.heads for layer in get("krea_2").layers} == {2}
    with pytest.raises(TextlocError, match="layer 0 has heads 0 to 1"):
        patched(get("krea_2"), Patch(source=0, target=1, layers=0, heads=2), 2).__enter__()


def test_a_compiled_denoiser_is_refused():
    pipe = tiny.sd3()
    pipe.transformer._compiled_call_impl = pipe.transformer._call_impl  # as its method compile leaves it
    with pytest.raises(TextlocError, match="the denoiser is compiled"):
        models.wrap(pipe)
    pipe = tiny.sd3()
    model = models.wrap(pipe)
    pipe.transformer.transformer_blocks[0]._compiled_call_impl = pipe.transformer._call_impl
    with pytest.raises(TextlocError, match="the denoiser is compiled"):
        patched(model, Patch(source=0, target=1, layers=0), 2).__enter__()


def test_two_denoisers_are_refused():
    pipe = families.wan()
    both = diffusers.WanPipeline(**pipe.components | {"transformer_2": families.wan().transformer}, boundary_ratio=0.5)
    with pytest.raises(TextlocError, match="two denoisers"):
        models.wrap(both)


@pytest.mark.parametrize(
    ("name", "rows"), [("flux_schnell", 1), ("flux2", 1), ("flux2_klein", 2), ("qwen_image", 2), ("krea_2", 2)]
)
def test_cost_of_a_prompt(get, name, rows):
    assert get(name).evaluations(4.0) == rows
    assert get("z_image").evaluations(0.0) == 1 and get("z_image").evaluations(1.0) == 2
