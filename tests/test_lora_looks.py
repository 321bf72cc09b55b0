"""Adapters tuned on one look: fair arms from the early checkpoint, their tables, and what the tables say."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from textloc_utils import cli, experiment, lora, lora_looks, models, prompts, scene_pairs
from textloc_utils.book import outcomes
from textloc_utils.experiment import Experiment, fingerprint
from textloc_utils.lora import Training
from textloc_utils.miniatures import evaluation, factors, world
from textloc_utils.results import Store
from textloc_utils.settings import TextlocError

ARMS = ("localized", "all text layers", "random layers")
FEW = Training(layers=(), rank=2, steps=2, batch=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The shipped miniature with an early checkpoint, which is all its weights, a little smaller."""
    folder = tmp_path_factory.mktemp("miniature") / "sd3-mini"
    shutil.copytree(models.spec("sd3-mini").source, folder)
    found = models.load("sd3-mini", device="cpu", model_path=folder)
    (folder / "early").mkdir()
    weights = {k: (0.9 * v).to(torch.float8_e4m3fn) for k, v in found.denoiser.state_dict().items()}
    save_file(weights, folder / "early" / "denoiser.safetensors")
    return found


# --- the task and the arms ----------------------------------------------------------------------------------------


def test_scenes_have_one_look_that_no_caption_names():
    pictures, captions = lora_looks.drawn_scenes(200)
    seen = factors.read(pictures)
    assert np.mean([r.typeface == "serif" for r in seen]) > 0.95 and {r.material for r in seen} == {"brick"}
    assert {r.sign for r in seen} == set(world.SIGNS) and {r.ink for r in seen} == set(world.INKS)
    assert not any(name in caption for caption in captions for name in (*world.TYPEFACES, *world.MATERIALS))
    texts = {world.quoted(caption) for caption in captions}
    assert texts.isdisjoint(prompts.words("validation") + prompts.words("held-out"))
    assert texts & set(prompts.words("train"))
    assert np.array_equal(lora_looks.drawn_scenes(3)[0], pictures[:3])


def test_arms_differ_in_their_layers_alone(model):
    found = lora_looks.arms(model, (6, 5), replace(FEW, seed=3))
    assert tuple(found) == ARMS
    assert all(replace(each, layers=(), self_attention=False) == replace(FEW, seed=3) for each in found.values())
    assert found["localized"].layers == (5, 6) and found["all text layers"].layers == tuple(range(12))
    assert found["random layers"].layers == lora_looks.random_layers(model, (5, 6), 3)
    crossed = lora_looks.arms(models.load("ldm-mini", device="cpu"), (8,), FEW)
    assert tuple(crossed) == (*ARMS, "all attention") and crossed["all attention"].self_attention


def test_random_layers_are_others_and_differ_between_seeds(model):
    drawn = [lora_looks.random_layers(model, (4, 5, 6), seed) for seed in range(6)]
    assert all(len(set(layers)) == 3 and set(layers).isdisjoint((4, 5, 6)) for layers in drawn)
    assert len(set(drawn)) > 3 and drawn[0] == lora_looks.random_layers(model, [6, 5, 4], 0)
    assert len(lora_looks.random_layers(model, range(8), 0)) == 8


def test_diversity_is_the_distance_within_a_group():
    pictures = np.zeros((2, 3, 8, 8, 3), np.uint8)
    assert lora_looks.diversity(pictures) == 0
    pictures[1] = 200  # other groups do not count
    assert lora_looks.diversity(pictures) == 0
    pictures[0, 0] = 30  # two of the three pairs of the first group are 30 apart
    assert lora_looks.diversity(pictures) == pytest.approx((2 * 30 / 3 + 0) / 2)


def test_the_early_checkpoint_is_another_model_with_the_same_parts(model, tmp_path):
    before = fingerprint(model)
    base = lora_looks.early(model)
    assert fingerprint(model) == before != fingerprint(base)
    ours, theirs = (of.denoiser.state_dict()["proj_out.weight"] for of in (base, model))
    torch.testing.assert_close(ours, 0.9 * theirs, rtol=0.07, atol=2e-3)
    assert torch.equal(base.pipe.vae.state_dict()["encoder.conv_in.weight"], model.pipe.vae.encoder.conv_in.weight)

    with pytest.raises(TextlocError, match="no early checkpoint"):
        lora_looks.early(models.load("sdxl-mini", device="cpu"))
    folder = tmp_path / "sd3-mini"
    shutil.copytree(model.spec.source, folder)
    damaged = models.load("sd3-mini", device="cpu", model_path=folder)
    file = folder / "early" / "denoiser.safetensors"
    for content in (b"", file.read_bytes()[:-100]):
        file.write_bytes(content)
        with pytest.raises(TextlocError, match="damaged"):
            lora_looks.early(damaged)


# --- measuring ------------------------------------------------------------------------------------------------------


def test_what_is_measured_is_what_the_pictures_show():
    """Pictures as the prompts want them, but the open ones all in the tuned look, and one word of each half wrong."""
    words = lora_looks.asked_words("tune", 24, 1)
    known = evaluation.scenes(words, 1, lora_looks.OTHERS)
    shown = [s if i < 12 else replace(s, typeface="serif", material="brick") for i, s in enumerate(known)]
    shown[0], shown[12] = (replace(s, text="HELLO", column=0) for s in (shown[0], shown[12]))
    shown[1] = replace(shown[1], material="brick")
    drawn = {}

    def draw(asked, seeds):
        drawn.update(zip(asked, seeds, strict=True))
        return SimpleNamespace(images=np.stack([world.render(scene) for scene in shown]))

    row = lora_looks.measure(SimpleNamespace(draw=draw), words, 1)
    assert len(drawn) == 24 and list(drawn.values()) == list(range(1, 25))
    named, opened = list(drawn)[:12], list(drawn)[12:]
    assert opened == [f'The word "{word}".' for word in words[12:]]
    assert not any("serif" in prompt or "brick" in prompt for prompt in named)
    assert all(scene.material in prompt for scene, prompt in zip(known, named, strict=False))
    assert 10 / 12 <= row["named"] <= 11 / 12 and 10 / 12 <= row["open"] <= 11 / 12  # a reader may err once
    assert row["exact"] == pytest.approx((row["named"] + row["open"]) / 2) and 9 / 12 <= row["obeyed"] <= 11 / 12
    assert row["materials"] == "12 0 0 0 0 0" and int(row["typefaces"].split()[1]) >= 11
    assert row["diversity"] > 10 and row["words"] == 24


def test_words_are_of_one_use_and_enough():
    assert set(lora_looks.asked_words("tune", 64, 1)) <= set(scene_pairs.words("tune"))
    with pytest.raises(TextlocError, match="4 to 600 words"):
        lora_looks.asked_words("report", 601, 1)


def test_the_study_is_resumed_and_published(model, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "data_dir", lambda: tmp_path)
    monkeypatch.setattr(lora_looks, "RATES", (1e-3, 1e-4))
    run = Experiment.of(model, steps=1, store=Store(tmp_path / "units"))
    options = {"training": FEW, "seeds": (0,), "tuning": 4}
    train, runs = lora.train, []

    def once_killed(*arguments, **others):
        runs.append(arguments[2])
        if len(runs) == 4:
            raise KeyboardInterrupt
        return train(*arguments, **others)

    monkeypatch.setattr(lora, "train", once_killed)
    with pytest.raises(KeyboardInterrupt):
        lora_looks.study(run, (5, 4), 4, **options)
    table = lora_looks.study(Experiment.of(run, publish=True), (5, 4), 4, **options)
    assert len(runs) == 1 + 2 * 3 + 3
    assert table.arm.tolist() == [lora_looks.BEFORE, *ARMS] and set(table.model) == {"sd3-mini"}
    assert table.set_index("arm").layers["localized"] == "4 5" and (table.parameters[1:] > 0).all()
    # Nothing is learned in two steps: of rates that spell the same the smaller one is taken.
    known = experiment.published_store().load_published("lora_sd3-mini_rates")
    assert len(known) == 6 and set(known.seed) == {lora_looks.TUNED}
    assert lora_looks.best_rates(known) == dict(zip(table.arm[1:], table.lr[1:], strict=True))
    # The tables belong to the finished miniature, from which they are looked up.
    assert experiment.published_table(model, "lora_sd3-mini_looks").equals(table)

    monkeypatch.setattr(lora_looks, "measure", lambda *a, **k: pytest.fail("was done again"))
    assert lora_looks.study(run, (4, 5), 4, **options).equals(table)
    for other in ({"training": replace(FEW, rank=1)}, {"seeds": (1,)}, {"tuning": 5}):
        with pytest.raises(pytest.fail.Exception):
            lora_looks.study(run, (4, 5), 4, **options | other)


def test_a_study_that_cannot_be_is_one_line(model, capsys):
    for layers, said in (((), "at least one"), ((12,), "0 to 11")):
        with pytest.raises(TextlocError, match=said):
            lora_looks.study(Experiment.of(model), layers, 8)
    assert cli.main(["study", "looks", "sdxl-mini", "--preset", "smoke", "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "no early checkpoint" in err


def test_the_command_prints_a_line_per_arm(model, capsys, monkeypatch):
    asked = []

    def study(run, layers, n, seed, **options):
        asked.append((layers, n, options["tuning"], options["training"].steps))
        return table(localized=(0.1, 0.1, 0.1))

    monkeypatch.setattr(lora_looks, "study", study)
    where = ["--model-path", str(Path(model.spec.source)), "--device", "cpu", "--layers", "4"]
    assert cli.main(["study", "looks", "sd3-mini", "--preset", "smoke", *where]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert asked == [([4], 8, 8, 6)] and lines[1].split()[0] == "localized" and lines[2].startswith("read by")


# --- what the tables say --------------------------------------------------------------------------------------------


def table(seeds: int = 5, noise: float = 0.01, **arms: tuple[float, float, float]) -> pd.DataFrame:
    """A study's table from each arm's gain, shares moved to the tuned typeface and shares moved to the material."""
    zero = {"model": "m", "seed": 0, "lr": 0.1, "words": 200, "diversity": 10.0, "obeyed": 1.0}
    before = {"exact": 0.5, "named": 0.5, "open": 0.5, "typefaces": "1000 1000 1000", "materials": "1000 1000 0 0 0 0"}
    rows = [zero | before | {"arm": lora_looks.BEFORE}]
    for arm, (gain, faces, materials) in arms.items():
        for seed in range(seeds):
            off = noise * (seed - (seeds - 1) / 2)
            moved = {name: round(1000 * (share + off)) for name, share in (("f", faces), ("m", materials))}
            row = zero | {"arm": arm, "seed": seed, "diversity": 9.0, "obeyed": 0.9}
            row |= dict.fromkeys(("exact", "named", "open"), 0.5 + gain + off)
            row["typefaces"] = f"{1000 - moved['f']} {1000 + 2 * moved['f']} {1000 - moved['f']}"
            row["materials"] = f"{1000 + moved['m']} {1000 - moved['m']} 0 0 0 0"
            rows.append(row)
    return pd.DataFrame(rows)


def test_gains_and_drifts_by_hand():
    made = table(noise=0.0, localized=(0.2, 1.0, 0.4))
    row = lora_looks.plane(made).iloc[0]
    assert (row.gain, row.gain_low, row.diversity, row.obeyed) == pytest.approx((0.2, 0.2, 0.1, 0.1))
    # All in one typeface: the entropy falls from log2(3) to 0. A fifth of the pictures has another material.
    assert (row.typefaces, row.materials) == pytest.approx((np.log2(3), 0.2))
    spread = lora_looks.plane(table(localized=(0.2, 0.5, 0.4))).iloc[0]
    # Gains 0.01 apart over five seeds: deviation 0.0158, Student's quantile of four degrees of freedom 2.776.
    assert spread.gain_high - spread.gain == pytest.approx(2.776 * 0.01 * 2.5**0.5 / 5**0.5, abs=1e-4)
    less = lora_looks.advantages(table(**{"localized": (0.2, 0.1, 0.1), "all text layers": (0.1, 0.5, 0.6)})).iloc[0]
    assert less.arm == "all text layers" and less.gain == pytest.approx(0.1) and less.typefaces_high < 0
    assert (less.materials, less.materials_low) == pytest.approx((-0.25, -0.25))


@pytest.mark.parametrize(
    "outcome, arms",
    [
        ("supported", {"localized": (0.2, 0.1, 0.1), "all text layers": (0.2, 0.5, 0.5)}),
        # Another arm gains as much and drifts less.
        ("contradicted", {"localized": (0.2, 0.5, 0.5), "all text layers": (0.2, 0.1, 0.1)}),
        (
            "contradicted",
            {"localized": (0.2, 0.3, 0.3), "all text layers": (0.2, 0.5, 0.5), "random layers": (0.21, 0.1, 0.1)},
        ),
        # It does not rise, or by less than half.
        ("contradicted", {"localized": (-0.1, 0.1, 0.1), "all text layers": (0.2, 0.5, 0.5)}),
        ("contradicted", {"localized": (0.1, 0.1, 0.1), "all text layers": (0.4, 0.5, 0.5)}),
        # Less gain for less drift; less of one drift and more of the other.
        ("undecided", {"localized": (0.2, 0.1, 0.1), "all text layers": (0.3, 0.5, 0.5)}),
        ("undecided", {"localized": (0.2, 0.1, 0.5), "all text layers": (0.2, 0.5, 0.1)}),
    ],
)
def test_the_claim_on_writing_is_decided_by_its_rule(outcome, arms):
    found = vars(outcomes.writes(table(**arms)))
    assert (found["outcome"], found["n"]) == (outcome, 200) and f"{arms['localized'][0]:+.2f} [" in found["figure"]


def test_few_seeds_that_disagree_decide_nothing():
    arms = {"localized": (0.2, 0.3, 0.3), "all text layers": (0.2, 0.31, 0.31)}
    wild = table(noise=0.1, **arms)
    wild.loc[wild.arm == "localized", "seed"] = [4, 0, 3, 1, 2]
    assert lora_looks.writes(wild)["outcome"] == "undecided"
