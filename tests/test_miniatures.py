"""The shipped miniatures: what their cards say of them is what they draw, and it is good enough for the book."""

from pathlib import Path

import numpy as np
import pytest
from diffusers import DiffusionPipeline

from textloc_utils import models, ocr, scene_pairs
from textloc_utils.generate import generate
from textloc_utils.miniatures import card, evaluation, factors, world
from textloc_utils.settings import data_dir

SHIPPED = [name for name in models.MINIATURES if (data_dir() / "miniatures" / name / "textloc.json").is_file()]
AGAIN, APART = 12, 16  #: how many of the card's pictures are drawn again, and how far they lie apart
#: The least that the book needs of a miniature, by the names of its card; of pictures that name everything, or nothing.
BARS = {"exact": 0.90, "exact_open": 0.85, "typeface": 0.90, "leak": 0.50}
BARS |= dict.fromkeys(("ink", "sign", "shape", "material"), 0.95)
LARGEST_ERROR, LEAST_THROUGH = 0.05, 0.95


def known(name: str) -> dict:
    """What a miniature's textloc.json says of its training."""
    return models.spec(name).trained


def shipped_files(*under: str) -> list[Path]:
    """All files of a miniature, or of all of them."""
    return [p for p in Path(data_dir(), "miniatures", *under).rglob("*") if p.is_file()]


def test_what_is_shipped():
    assert list(models.MINIATURES) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_miniature_draws_what_its_card_says(name):
    """Some of the test words once more, from the same noise."""
    scenes, read = card.test_scenes(), known(name)["test"]["read"]
    assert len(scenes) == len(read) == card.WORDS
    chosen = range(0, AGAIN * APART, APART)
    asked = [scenes[i] for i in chosen]
    model = models.load(name, device="cpu")
    pictures = generate(model, [evaluation.named(scene) for scene in asked], [42 + i for i in chosen]).images
    # Other processors and other batches round otherwise: a letter's edge may tip over.
    again = ocr.read(pictures)
    assert sum(a == read[i] for a, i in zip(again, chosen, strict=True)) >= AGAIN - 1, again
    looks = [
        getattr(seen, factor) == getattr(scene, factor)
        for seen, scene in zip(factors.read(pictures), asked, strict=True)
        for factor in world.FACTORS
    ]
    assert np.mean(looks) >= 0.9


@pytest.mark.parametrize("name", SHIPPED)
def test_a_miniature_is_good_enough(name):
    test = known(name)["test"]
    assert (test["words"], test["split"]) == (200, "held-out")
    short = {key: test[key]["mean"] for key, least in BARS.items() if test[key]["mean"] < least}
    assert short == {} and test["cer"]["mean"] <= LARGEST_ERROR
    # What the card says in words are these figures.
    told = (data_dir() / "miniatures" / name / "README.md").read_text()
    assert all(card._rate(test[key]) in told for key in (*BARS, "cer"))


@pytest.mark.parametrize("name", SHIPPED)
def test_an_autoencoder_leaves_the_words_readable(name):
    parts = {p.name for p in Path(models.spec(name).source).iterdir()}
    assert bool({"vae", "vqvae"} & parts) == ("autoencoder" in known(name)) == (name != "if-mini")
    if "autoencoder" in known(name):
        through = known(name)["autoencoder"]
        assert through["words"] == 200 and through["exact"]["mean"] >= LEAST_THROUGH


@pytest.mark.parametrize("name", SHIPPED)
def test_the_early_checkpoint_spells_seven_words_of_ten(name):
    early = known(name)["early"]
    assert early["in_range"] and 0.65 <= early["validation"]["exact"]["mean"] <= 0.75
    assert early["validation"]["split"] == "validation" and early["samples"] < known(name)["samples"]
    assert (Path(models.spec(name).source) / "early" / "denoiser.safetensors").is_file()


@pytest.mark.parametrize("name", SHIPPED)
def test_a_miniature_is_of_the_second_world(name):
    model = models.load(name, device="cpu")
    assert scene_pairs.world_of(model) is world.SECOND and model.spec.prompt_template == world.NAMED


@pytest.mark.parametrize("name", SHIPPED)
def test_plain_diffusers_loads_it(name):
    pipe = DiffusionPipeline.from_pretrained(data_dir() / "miniatures" / name, use_safetensors=True)
    assert type(pipe).__name__ == models.spec(name).pipeline


@pytest.mark.parametrize("name", SHIPPED)
def test_weights_are_safetensors_below_16_mb(name):
    files = shipped_files(name)
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
    assert sum(p.suffix == ".safetensors" for p in files) >= 3 and max(p.stat().st_size for p in files) < 16e6


def test_all_miniatures_together_stay_below_64_mb():
    assert sum(p.stat().st_size for p in shipped_files()) <= 64e6


@pytest.mark.parametrize("name", SHIPPED)
def test_the_training_log_shows_every_layer_s_effect(name):
    evaluations = models.training_log(models.spec(name))["evaluations"]
    layers = len(models.describe(name)["text_layers"])
    seen = [e["samples"] for e in evaluations]
    assert len(seen) >= 12 and seen == sorted(seen)
    # Before there are letters, layers are not patched alone.
    late = [e for e in evaluations if max(e["characters"], e["all_layers"]) >= evaluation.SPELLS]
    assert len(late) >= 6 and late[-1] is evaluations[-1]
    assert all(len(e["target"]) == len(e["source"]) == len(e["exact_layers"]) == layers for e in late)
