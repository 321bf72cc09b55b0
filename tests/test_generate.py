"""Sampling: noise per row, cost, what is handed to each pipeline class, and mistakes."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from textloc_utils.generate import generate, save
from textloc_utils.patching import Patch
from textloc_utils.settings import TextlocError

HELLO, WORLD = 'A sign that says "HELLO".', 'A sign that says "WORLD".'


@pytest.fixture(scope="module", params=list(tiny.BUILDERS))
def model(request):
    return tiny.model(request.param)


@pytest.fixture(scope="module")
def sd3():
    return tiny.model("sd3")


def far(a, b):
    return np.abs(a.astype(float) - b).mean()


def test_pictures_and_cost(model):
    made = generate(model, [HELLO, WORLD, HELLO], [1, 2, 3])
    side = model.spec.height
    assert made.images.shape == (3, side, side, 3) and made.images.dtype == np.uint8
    # FLUX takes its guidance as a number; everything else doubles its batch.
    halves = 1 if model.spec.pipeline == "FluxPipeline" else 2
    assert made.row_evaluations == 3 * model.spec.steps * halves
    assert made.seconds > 0
    assert made.images.std() > 5
    assert not model.denoiser._forward_pre_hooks


def test_a_row_does_not_depend_on_its_batch(model):
    """Only rounding, at most a grey level or so, may differ between batches of other sizes and orders."""
    together = generate(model, [HELLO, WORLD, HELLO], [1, 2, 3]).images
    turned = generate(model, [HELLO, WORLD, HELLO][::-1], [3, 2, 1]).images[::-1]
    in_pairs = generate(model, [HELLO, WORLD, HELLO], [1, 2, 3], batch_size=2).images
    for other in (turned, in_pairs):
        assert np.abs(together.astype(int) - other).max() <= 1
    assert far(together[0], together[2]) > 5  # another seed, another picture


def test_same_seed_same_bits(model):
    one, two = (generate(model, [HELLO, HELLO], [1, 1]).images for _ in range(2))
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one[0], one[1])


def test_steps_and_guidance(model):
    plain = generate(model, [HELLO], [1], guidance=1.0, steps=2)
    assert plain.row_evaluations == 2
    assert far(plain.images, generate(model, [HELLO], [1], guidance=5.0, steps=2).images) > 0.05


def test_patches_need_one_batch(sd3):
    patch = Patch(source=2, target=0, layers=(0, 1, 2), pooled=True)
    made = generate(sd3, [WORLD, HELLO, HELLO], [1, 1, 1], patches=[patch], batch_size=1)
    np.testing.assert_array_equal(made.images[2], made.images[0])
    assert far(made.images[2], made.images[1]) > 0.5
    assert made.row_evaluations == 3 * 2 * sd3.spec.steps


def test_negative_prompt(sd3):
    plain = generate(sd3, [HELLO, WORLD], [1, 2]).images
    assert far(plain, generate(sd3, [HELLO, WORLD], [1, 2], negative_prompt="red stone").images) > 0.1
    ldm = tiny.model("ldm")
    with pytest.raises(TextlocError, match="LDMTextToImagePipeline takes no negative prompt"):
        generate(ldm, [HELLO], [1], negative_prompt="red")
    flux = tiny.model("flux")  # ignores it without true guidance
    with pytest.raises(TextlocError, match="FluxPipeline reads a negative prompt only with a true_cfg_scale above 1"):
        generate(flux, [HELLO], [1], negative_prompt="red")
    plain = generate(flux, [HELLO], [1]).images
    assert far(plain, generate(flux, [HELLO], [1], negative_prompt="red", true_cfg_scale=3.0).images) > 0.1


def test_keyword_arguments_reach_the_pipeline(sd3):
    assert generate(sd3, [HELLO], [1], width=32).images.shape == (1, 16, 32, 3)


def test_progress_bar(sd3, capsys):
    generate(sd3, [HELLO], [1], progress=True)
    assert "3/3" in capsys.readouterr().err
    generate(sd3, [HELLO], [1])
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompts", "seeds", "how", "message"),
    [
        ([], [], {}, "at least one prompt"),
        ([HELLO], [1, 2], {}, "1 prompts came with 2 seeds"),
        ([HELLO], [-1], {}, "seed is out of range"),
        ([HELLO, "red " * 20], [1, 2], {}, "prompt of 2[12] tokens is too long; tiny-sd3 takes 16"),
        ([HELLO], [1], {"negative_prompt": "red " * 20}, "too long"),
        ([HELLO], [1], {"steps": 0}, "steps must be at least 1"),
        ([HELLO], [1], {"batch_size": 0}, "batch size must be at least 1"),
        (HELLO, [1], {}, "needs a list of at least one prompt"),
        ("ab", [1, 2], {}, "needs a list of at least one prompt"),
        (None, [1], {}, "needs a list of at least one prompt"),
        ([HELLO, 3], [1, 2], {}, "each a string"),
        ([HELLO], ["1"], {}, "seeds must be an integer or integers"),
        ([HELLO], [1.5], {}, "seeds must be an integer or integers"),
        ([HELLO], None, {}, "seeds must be an integer or integers"),
        ([HELLO], [2**63], {}, "seed is out of range"),
        ([HELLO], [1], {"steps": "3"}, "steps must be an integer"),
        ([HELLO], [1], {"steps": (1, 2)}, "steps must be one integer"),
        ([HELLO], [1], {"batch_size": 1.5}, "batch size must be an integer"),
        ([HELLO], [1], {"guidance": float("nan")}, "guidance must be a finite number"),
        ([HELLO], [1], {"guidance": "4"}, "guidance must be a finite number"),
        ([HELLO], [1], {"patches": [Patch(source=0, target=1, layers=(0,))]}, "row 1 is out of range"),
    ],
)
def test_mistakes(sd3, prompts, seeds, how, message):
    ran = []
    handle = sd3.denoiser.register_forward_pre_hook(lambda *a: ran.append(1))
    with pytest.raises(TextlocError, match=message):
        generate(sd3, prompts, seeds, **how)
    handle.remove()
    assert not ran


def test_save(sd3, tmp_path):
    made = generate(sd3, [HELLO, WORLD], [1, 2])
    rows = save(tmp_path, made.images, [HELLO, WORLD], [1, 2], ["HELLO", ""])
    assert rows == json.loads((tmp_path / "images.json").read_text())
    assert rows[1] == {"prompt": WORLD, "seed": 2, "file": "001.png", "ocr": ""}
    for row, image in zip(rows, made.images, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / row["file"])), image)


def test_a_killed_save_names_no_picture_of_another_call(sd3, tmp_path, monkeypatch):
    first, second = (generate(sd3, [HELLO, WORLD], seeds) for seeds in ([1, 2], [3, 4]))
    save(tmp_path, first.images, [HELLO, WORLD], [1, 2], ["", ""])
    replace = os.replace

    def killed(old, new):
        replace(old, new)
        if Path(new).name == "000.png":
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, second.images, [HELLO, WORLD], [3, 4], ["", ""])
    assert json.loads((tmp_path / "images.json").read_text()) == []


# --- what is not finite -------------------------------------------------------------------------------------------


@pytest.fixture
def spoiled():
    """Adds to what a module answers from its n-th call on."""
    handles = []

    def spoil(module, value, call=1):
        calls = []

        def add(module, args, output):
            calls.append(1)
            if len(calls) < call:
                return output
            if isinstance(output, torch.Tensor):
                return output + value
            if isinstance(output, tuple):
                return (output[0] + value, *output[1:])
            output["sample"] = output["sample"] + value
            return output

        handles.append(module.register_forward_hook(add))

    yield spoil
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("call", [1, 2])
def test_the_first_answer_that_is_not_finite_stops_the_drawing(model, spoiled, value, call):
    spoiled(model.denoiser, value, call)
    with pytest.raises(TextlocError, match=f"call {call} is not finite") as error:
        generate(model, [HELLO, WORLD], [1, 2])
    assert "\n" not in str(error.value) and not model.denoiser._forward_pre_hooks


def test_one_number_of_one_row_is_enough(sd3, spoiled):
    value = torch.zeros(4, 1, 1, 1)
    value[3] = float("nan")
    spoiled(sd3.denoiser, value)
    with pytest.raises(TextlocError, match="call 1 is not finite"):
        generate(sd3, [HELLO, WORLD], [1, 2])


def test_a_picture_that_is_not_finite_is_named(sd3, spoiled):
    """The denoiser is well, and the autoencoder is not: it overflows in half precision, for one."""
    value = torch.zeros(2, 1, 1, 1)
    value[1] = float("nan")
    spoiled(sd3.pipe.vae.decoder, value)
    with pytest.raises(TextlocError, match=r"picture 1 of 2 is not finite \(seed 7\)") as error:
        generate(sd3, [HELLO, WORLD], [1, 7])
    assert "\n" not in str(error.value)


def test_given_noise_that_is_not_finite_is_told(sd3):
    noise = torch.full((1, 4, 8, 8), float("nan"))
    with pytest.raises(TextlocError, match="not finite"):
        generate(sd3, [HELLO], [1], noise=noise)
