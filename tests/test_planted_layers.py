"""Planted models: the letters reach the picture through the chosen text layers only, and through all of those."""

import numpy as np
import pytest
import torch

from textloc_utils.generate import generate
from textloc_utils.miniatures import autoencoder, encoders, planted, training
from textloc_utils.models import Model, ModelSpec
from textloc_utils.patching import Patch
from textloc_utils.settings import TextlocError, quiet_libraries

quiet_libraries()

SOURCE, TARGET = 'A red sign against brick says "HELLO".', 'A red sign against brick says "WATER".'
SEEING = {"sd3-mini": (3, 7), "ldm-mini": (2, 5, 6), "sdxl-mini": (11,)}


def build(name, seeing):
    """A planted model as initialised, its modulations and last layers random, so that text matters."""
    rules = training.recipe(name)
    torch.manual_seed(0)
    kinds = {component: encoders.KINDS[kind] for component, (kind, _) in rules.TEXT.items()}
    tokenizers = {component: kind.make_tokenizer() for component, kind in kinds.items()}
    made = {component: kind.build(tokenizers[component]).eval() for component, kind in kinds.items()}
    vae = autoencoder.build(**rules.LATENTS).eval()
    pipe = rules.pipeline(training.Prepared(encoders=made, tokenizers=tokenizers, vae=vae, report={}))
    pipe.set_progress_bar_config(disable=True)
    spec = ModelSpec(name=name, source="", miniature=True, **rules.SPEC)
    model = Model.from_pipeline(pipe, spec)
    for module in model.denoiser.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.2)
    if seeing:
        planted.install(pipe, spec, seeing)
    return model


def draw(model, layers, prompts=(SOURCE, TARGET)):
    patches = [Patch(source=0, target=1, layers=layers)] if layers else []
    return generate(model, list(prompts), [1, 1], patches=patches, steps=2).images[:2]


@pytest.mark.parametrize("name", SEEING)
def test_the_planted_layers_carry_the_letters_and_no_others_do(name):
    model = build(name, SEEING[name])
    source, target = draw(model, ()).astype(int)
    assert np.abs(source - target).max() > 20  # the letters matter
    others = tuple(set(range(len(model.layers))) - set(SEEING[name]))
    # Rows of a batch may round otherwise: one grey level.
    np.testing.assert_allclose(draw(model, SEEING[name])[0], target, atol=1)
    np.testing.assert_allclose(draw(model, others)[0], source, atol=1)
    if len(SEEING[name]) > 1:
        assert np.abs(draw(model, SEEING[name][:1])[0] - source).max() > 1


@pytest.mark.parametrize("name", SEEING)
def test_without_planting_other_layers_see_the_letters(name):
    model = build(name, ())
    others = tuple(set(range(len(model.layers))) - set(SEEING[name]))
    assert np.abs(draw(model, others)[0].astype(int) - draw(model, ())[0]).max() > 1


def test_planted_layers_must_exist():
    with pytest.raises(TextlocError, match=r"text layers \[12\] are out of range; allowed: some of 0 to 11"):
        build("sd3-mini", (12,))
