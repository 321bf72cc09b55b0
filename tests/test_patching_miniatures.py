"""Patching against the two-pass implementation once more: on the trained miniatures, with the book's prompts."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from two_pass import TOLERANCE, VISIBLE, assert_patched, record, replay, sample, two_pass

from textloc_utils import models, scene_pairs
from textloc_utils.generate import generate
from textloc_utils.patching import Patch, patched
from textloc_utils.settings import TextlocError, data_dir

SHIPPED = [name for name in models.MINIATURES if (data_dir() / "miniatures" / name / "textloc.json").is_file()]
STEPS = 3
ONE, OTHER = scene_pairs.make(2, "report")


def shipped(name):
    """A shipped miniature that samples in few steps, with its second stage where it has one."""
    model = models.load(name, device="cpu")
    fewer = {"steps": STEPS}
    if model.stage2 is not None:
        fewer["stage2_arguments"] = model.spec.stage2_arguments | {"num_inference_steps": 2}
    return replace(model, spec=replace(model.spec, **fewer))


@pytest.fixture(scope="module", params=SHIPPED)
def finished(request):
    return shipped(request.param)


@pytest.fixture
def model(finished):
    """The model whose layers are patched: without the second stage, which would hide differences."""
    return replace(finished, stage2=None)


@pytest.fixture
def double(finished):
    """Double precision while a test runs: in single, batches of other sizes alone differ by about the tolerance."""
    pipes = [p for p in (finished.pipe, finished.stage2) if p is not None]
    for pipe in pipes:
        pipe.to(torch.float64)
    yield
    for pipe in pipes:  # the weights come back exactly
        pipe.to(torch.float32)


def everywhere(model):
    """All that a patch can copy: every layer, and the pooled embedding where there is one."""
    return {"layers": tuple(range(len(model.layers))), "pooled": model.pooled_site is not None}


def test_patching_nothing_changes_no_bit(model):
    rows, seeds = [ONE.source, ONE.target], [ONE.seed] * 2
    plain = sample(model, rows, seeds)
    for patches in ([], [Patch(source=0, target=1)], [Patch(source=0, target=1, stop=0, **everywhere(model))]):
        with patched(model, patches, 2):
            np.testing.assert_array_equal(sample(model, rows, seeds), plain)


def test_leaving_the_block_restores_the_pipeline(model):
    rows, seeds, patch = [ONE.source, ONE.target], [ONE.seed] * 2, Patch(source=0, target=1, **everywhere(model))
    before = sample(model, rows, seeds)
    with patched(model, [patch], 2):
        inside = sample(model, rows, seeds)
    np.testing.assert_array_equal(sample(model, rows, seeds), before)
    # The engine's own refusal comes from within the denoiser, amid the hooks.
    with pytest.raises(TextlocError, match="made for 2 rows"), patched(model, [patch], 2):
        sample(model, [*rows, OTHER.source], [*seeds, OTHER.seed])
    np.testing.assert_array_equal(sample(model, rows, seeds), before)
    assert np.abs(inside[0] - before[0]).mean() > VISIBLE
    np.testing.assert_array_equal(inside[1], before[1])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.denoiser.modules())


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_every_kind_of_patch_in_one_batch(model, double, guidance):
    """Two pairs share a batch; each patched row is what the two-pass implementation makes of it alone."""
    every = tuple(range(len(model.layers)))
    kinds = [
        {"layers": (len(every) // 2,)},
        {"layers": every},
        {"layers": every, "tensors": "k"},
        {"layers": every, "tensors": "v"},
        {"layers": every, "start": 1, "stop": 2},
        {"layers": every, "heads": (0,)},
    ]
    if model.pooled_site is not None:
        kinds += [{"pooled": True}, {"layers": every, "pooled": True}]
    rows = [(ONE, "target"), (OTHER, "target"), (OTHER, "source"), (ONE, "source")] + [(ONE, "source")] * len(kinds)
    patches = [Patch(source=2, target=1, layers=every)]
    patches += [Patch(source=4 + i, target=0, **kind) for i, kind in enumerate(kinds)]
    with patched(model, patches, len(rows)):
        out = sample(model, [getattr(p, end) for p, end in rows], [p.seed for p, _ in rows], guidance)
    target, _, other, *own = out  # own: the unpatched source, then the kinds

    reference = two_pass(model, OTHER.source, OTHER.target, OTHER.seed, layers=every, guidance=guidance)
    assert np.abs(other - reference).max() <= TOLERANCE
    stored = record(model, ONE.target, ONE.seed, guidance=guidance)
    for kind, picture in zip([{}, *kinds], own, strict=True):
        reference = replay(model, ONE.source, ONE.seed, stored, **kind, guidance=guidance)
        assert np.abs(picture - reference).max() <= TOLERANCE, kind
    # Each kind does something, and something else than the others: no comparison above was of equal pictures.
    assert min(np.abs(a - b).max() for a, b in combinations(own, 2)) > 10 * TOLERANCE
    # With everything copied nothing of the source's prompt is left.
    assert np.abs(own[-1 if model.pooled_site else 2] - target).max() <= TOLERANCE
    assert np.abs(own[2] - own[0]).mean() > VISIBLE


def test_finished_pictures(finished, double):
    """Through ``generate``, in full size: a second stage sees the source's prompt."""
    where = everywhere(finished)
    rows, patch = [ONE.source, ONE.target, ONE.source], Patch(source=0, target=1, **where)
    made = generate(finished, rows, [ONE.seed] * 3, guidance=1.0, patches=[patch]).images.astype(int)
    assert made.shape == (3, finished.spec.height, finished.spec.width, 3)
    reference = two_pass(finished, ONE.source, ONE.target, ONE.seed, guidance=1.0, **where)
    assert np.abs(made[0] - np.rint(reference * 255)).max() <= 1
    assert np.abs(made[0] - made[2]).mean() > 255 * VISIBLE


@pytest.mark.parametrize("name", SHIPPED)
def test_lora_wrapped_layers(name):
    peft = pytest.importorskip("peft")
    model = replace(shipped(name), stage2=None)
    model.pipe.to(torch.float64)
    bare = sample(model, [ONE.source], [ONE.seed], 1.0)
    torch.manual_seed(0)
    modules = [site.rpartition(".")[2] for site in (model.layers[0].key, model.layers[0].value)]
    model.denoiser.add_adapter(peft.LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=modules))
    where = everywhere(model)
    with patched(model, [Patch(source=0, target=1, **where)], 3):
        out = sample(model, [ONE.source, ONE.target, ONE.source], [ONE.seed] * 3, 1.0)
    assert_patched(out[0], two_pass(model, ONE.source, ONE.target, ONE.seed, guidance=1.0, **where), out[2])
    assert np.abs(out[2] - bare[0]).mean() > VISIBLE  # the adapter took part
