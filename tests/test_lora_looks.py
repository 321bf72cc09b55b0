"""Adapters tuned on one look: fair arms from the early checkpoint, their tables, and what the tables say."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file

from textloc_utils import cli, experiment, lora, lora_looks, models, prompts, scene_pairs, sites
from textloc_utils.book import outcomes
from textloc_utils.cli import adapters
from textloc_utils.experiment import Experiment, fingerprint
from textloc_utils.lora import Training
from textloc_utils.miniatures import evaluation, factors, world
from textloc_utils.results import Store
from textloc_utils.settings import TextlocError

ARMS = ("localized", "all text layers", "random layers")
FEW = Training(layers=(), rank=2, steps=2, batch=2)
SPEC = ("family", "pipeline", "steps", "guidance", "height", "width", "max_sequence_length")


@pytest.fixture(scope="module")
def model(of_the_world, tmp_path_factory):
    """A saved miniature of random weights with three layers; its early checkpoint is its weights, a little smaller."""
    folder, made = tmp_path_factory.mktemp("miniature") / "sd3-mini", of_the_world("sd3")
    made.pipe.save_pretrained(folder)
    (folder / "textloc.json").write_text(json.dumps({name: getattr(made.spec, name) for name in SPEC}))
    shutil.copy(Path(made.spec.source) / "training.json", folder)
    (folder / "early").mkdir()
    weights = {k: (0.9 * v).to(torch.float8_e4m3fn) for k, v in made.denoiser.state_dict().items()}
    save_file(weights, folder / "early" / "denoiser.safetensors")
    return models.load("sd3-mini", device="cpu", model_path=folder)


@pytest.fixture
def plain():
    """A pipeline that is no miniature."""
    made = tiny.model("ldm")
    return replace(made, spec=replace(made.spec, miniature=False))


def fails(capsys, *arguments) -> str:
    assert cli.main([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("textloc: ")
    return err


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
    found = lora_looks.arms(model, (2, 1), replace(FEW, seed=3))
    assert tuple(found) == ARMS
    assert all(replace(each, layers=(), self_attention=False) == replace(FEW, seed=3) for each in found.values())
    assert found["localized"].layers == (1, 2) and found["all text layers"].layers == (0, 1, 2)
    assert found["random layers"].layers == sites.random_layers(model, (1, 2), 3)
    crossed = lora_looks.arms(tiny.model("ldm"), (1,), FEW)
    assert tuple(crossed) == (*ARMS, "all attention") and crossed["all attention"].self_attention
    assert not any(found[arm].self_attention for arm in ARMS)


def test_random_layers_are_others_and_differ_between_seeds():
    model = SimpleNamespace(layers=range(12))
    drawn = [sites.random_layers(model, (4, 5, 6), seed) for seed in range(6)]
    assert all(len(set(layers)) == 3 and set(layers).isdisjoint((4, 5, 6)) for layers in drawn)
    assert len(set(drawn)) > 3 and drawn[0] == sites.random_layers(model, [6, 5, 4], 0)
    assert len(sites.random_layers(model, range(8), 0)) == 8


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
        lora_looks.early(tiny.model("sd3"))
    folder = tmp_path / "sd3-mini"
    shutil.copytree(model.spec.source, folder)
    damaged = models.load("sd3-mini", device="cpu", model_path=folder)
    file = folder / "early" / "denoiser.safetensors"
    for content in (b"", file.read_bytes()[:-100]):
        file.write_bytes(content)
        with pytest.raises(TextlocError, match="damaged"):
            lora_looks.early(damaged)


# --- measuring ------------------------------------------------------------------------------------------------------


def test_the_strongest_layers_of_the_early_checkpoint_are_the_logs(model, monkeypatch):
    samples = 7
    model = replace(model, spec=replace(model.spec, trained={"early": {"samples": samples}}))
    log = {
        "evaluations": [{"samples": 1, "target": [0.9, 0, 0, 0]}, {"samples": samples, "target": [0.1, 0.4, 0.0, 0.3]}]
    }
    monkeypatch.setattr(models, "training_log", lambda spec: log)
    assert lora_looks.strongest_early(model, 2) == (1, 3)
    log["evaluations"].pop()
    assert lora_looks.strongest_early(model, 2) == ()
    monkeypatch.setattr(models, "training_log", lambda spec: None)
    assert lora_looks.strongest_early(model, 2) == ()


def test_what_is_measured_is_what_the_pictures_show(model):
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

    row = lora_looks.measure(SimpleNamespace(draw=draw, model=model), words, 1)
    assert len(drawn) == 24 and list(drawn.values()) == list(range(1, 25))
    named, opened = list(drawn)[:12], list(drawn)[12:]
    assert opened == [f'The word "{word}".' for word in words[12:]]
    assert not any("serif" in prompt or "brick" in prompt for prompt in named)
    assert all(scene.material in prompt for scene, prompt in zip(known, named, strict=False))
    assert 10 / 12 <= row["named"] <= 11 / 12 and 10 / 12 <= row["open"] <= 11 / 12  # a reader may err once
    assert row["exact"] == pytest.approx((row["named"] + row["open"]) / 2) and 9 / 12 <= row["obeyed"] <= 11 / 12
    assert row["materials"] == "12 0 0 0 0 0" and int(row["typefaces"].split()[1]) >= 11
    assert row["diversity"] > 10 and row["words"] == 24


def test_of_other_models_pictures_no_look_is_read(plain):
    words, drawn = lora_looks.asked_words("tune", 8, 1), []

    def draw(asked, seeds):
        drawn.extend(zip(asked, seeds, strict=True))
        return SimpleNamespace(images=np.stack([world.render(world.Scene(text=w)) for w in [*words[:7], "HELLO"]]))

    row = lora_looks.measure(SimpleNamespace(draw=draw, model=plain), words, 1)
    assert [seed for _, seed in drawn] == list(range(1, 9))
    for i, (prompt, _) in enumerate(drawn):
        assert prompts.quoted_text(prompt) == words[i]
        assert ("wall" in prompt) == (i < 4) and (prompt == f'A sign that says "{words[i]}".') == (i >= 4)
    assert row.keys() == {"words", "exact", "named", "open", "diversity"}
    assert row["exact"] == pytest.approx((row["named"] + row["open"]) / 2) and row["open"] <= 3 / 4 <= row["named"]


def test_words_are_of_one_use_and_enough():
    assert set(lora_looks.asked_words("tune", 64, 1)) <= set(scene_pairs.words("tune"))
    with pytest.raises(TextlocError, match="from 4 to 600, got 601"):
        lora_looks.asked_words("report", 601, 1)


def test_the_study_is_resumed_and_published(model, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "data_dir", lambda: tmp_path)
    monkeypatch.setattr(lora_looks, "RATES", (1e-3, 1e-4))
    run = Experiment.of(model, steps=1, store=Store(tmp_path / "units"))
    options = {"training": FEW, "seeds": (0,)}
    train, runs = lora.train, []

    def once_killed(*arguments, **others):
        runs.append(arguments[2])
        if len(runs) == 4:
            raise KeyboardInterrupt
        return train(*arguments, **others)

    monkeypatch.setattr(lora, "train", once_killed)
    with pytest.raises(KeyboardInterrupt):
        lora_looks.study(run, (2, 0), 4, **options)
    table = lora_looks.study(Experiment.of(run, publish=True), (2, 0), 4, **options)
    assert len(runs) == 1 + 2 * 3 + 3
    assert table.arm.tolist() == [lora_looks.BEFORE, *ARMS] and set(table.model) == {"sd3-mini"}
    assert table.set_index("arm").layers["localized"] == "0 2" and (table.parameters[1:] > 0).all()
    # Nothing is learned in two steps: of rates that spell the same the smaller one is taken.
    known = experiment.published_store().load_published("lora_sd3-mini_rates")
    assert len(known) == 6 and set(known.seed) == {lora_looks.TUNED}
    assert lora_looks.best_rates(known) == dict(zip(table.arm[1:], table.lr[1:], strict=True))
    # The tables belong to the finished miniature, from which they are looked up.
    assert experiment.published_table(model, "lora_sd3-mini_looks").equals(table)

    monkeypatch.setattr(lora_looks, "measure", lambda *a, **k: pytest.fail("was done again"))
    assert lora_looks.study(run, (0, 2), 4, **options).equals(table)
    for other in ({"training": replace(FEW, rank=1)}, {"seeds": (1,)}, {"n": 5}, {"layers": (0, 1)}):
        with pytest.raises(pytest.fail.Exception):
            lora_looks.study(run, **{"layers": (0, 2), "n": 4} | options | other)


def test_rates_are_chosen_on_as_many_words_as_are_reported_at_most(model, monkeypatch):
    asked = []

    def run(experiment, data, training, words, seed):
        asked.append(len(words))
        return {"model": "m", "exact": 0.0, "lr": training.lr if training else 0.0}

    monkeypatch.setattr(lora_looks, "_run", run)
    for n in (5, 300):
        lora_looks.study(Experiment.of(model), (1,), n, seeds=(0,))
    tried, reported = 3 * len(lora_looks.RATES), 1 + 3
    assert asked == [5] * (tried + reported) + [lora_looks.TUNING] * tried + [300] * reported


def test_a_study_that_cannot_be_is_one_line(model, capsys, tmp_path):
    for layers, said in (((), "at least one"), ((3,), "0 to 2")):
        with pytest.raises(TextlocError, match=said):
            lora_looks.study(Experiment.of(model), layers, 8)
    bare = shutil.copytree(model.spec.source, tmp_path / "bare", ignore=shutil.ignore_patterns("early"))
    where = ["--model-path", bare, "--device", "cpu", "--preset", "smoke"]
    assert "no early checkpoint" in fails(capsys, "study", "looks", "sd3-mini", "--layers", 0, *where)
    assert "0 to 2" in fails(capsys, "study", "looks", "sd3-mini", "--layers", 3, *where)


def test_the_command_prints_a_line_per_arm(model, capsys, monkeypatch):
    asked = []

    def study(run, layers, n, seed, *, training):
        asked.append((layers, n, training.steps))
        return table(localized=(0.1, 0.1, 0.1))

    monkeypatch.setattr(lora_looks, "study", study)
    where = ["--model-path", model.spec.source, "--device", "cpu", "--layers", "1"]
    assert cli.main(["study", "looks", "sd3-mini", "--preset", "smoke", *where]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert asked == [([1], 8, 6)] and lines[1].split()[0] == "localized" and lines[2].startswith("read by")


# --- one adapter ----------------------------------------------------------------------------------------------------


def adapted(model, folder: Path, seed: int = 0) -> Path:
    """The folder of an adapter that changes pictures."""
    size = (2, model.spec.height, model.spec.width, 3)
    pictures = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    training = replace(FEW, layers=(0, 1, 2), lr=0.5, seed=seed)
    lora.train(model, lora.prepare(model, pictures, ['The word "RIVER".'] * 2), training, folder=folder)
    lora.remove(model)
    return folder


def test_an_adapter_is_measured_without_it_and_with_it(model, tmp_path, monkeypatch):
    run, folder, other = (
        Experiment.of(model, steps=1),
        adapted(model, tmp_path / "adapter"),
        adapted(model, tmp_path / "other", seed=1),
    )
    before = fingerprint(model)
    table = lora_looks.evaluate(run, folder, 4)
    assert fingerprint(model) == before and not getattr(model.denoiser, "peft_config", None)
    assert table.arm.tolist() == ["before", "after"] and table.words.tolist() == [4, 4]
    words = lora_looks.asked_words("report", 4, 42)
    for row in table.to_dict("records"):
        if row.pop("arm") == "after":
            lora.load(model, folder)
        try:
            assert row == lora_looks.measure(run, words, 42)
        finally:
            if getattr(model.denoiser, "peft_config", None):
                lora.remove(model)
    assert table.diversity.nunique() == 2, "the adapter is on"
    measure, asked = lora_looks.measure, []
    monkeypatch.setattr(lora_looks, "measure", lambda *a: asked.append(a) or measure(*a))
    assert lora_looks.evaluate(run, folder, 4).equals(table) and not asked
    assert not lora_looks.evaluate(run, other, 4)[1:].equals(table[1:]) and len(asked) == 1, "its bytes are told apart"
    for changed in ({"n": 5}, {"seed": 1}):
        asked.clear()
        lora_looks.evaluate(run, folder, **{"n": 4} | changed)
        assert len(asked) == 2


def test_an_adapter_that_fails_in_between_is_removed(model, tmp_path, monkeypatch):
    folder = adapted(model, tmp_path / "adapter")

    def broken(*arguments):
        raise RuntimeError("no picture")

    monkeypatch.setattr(lora_looks, "measure", broken)
    with pytest.raises(RuntimeError, match="no picture"):
        lora_looks.evaluate(Experiment.of(model, steps=1), folder, 4)
    assert not getattr(model.denoiser, "peft_config", None)


def test_an_adapter_of_a_pipeline_that_is_no_miniature_is_measured(plain, tmp_path):
    before = fingerprint(plain)
    table = lora_looks.evaluate(Experiment.of(plain, steps=1), adapted(plain, tmp_path / "adapter"), 4)
    assert set(table) == {"words", "exact", "named", "open", "diversity", "arm"}
    assert table.arm.tolist() == ["before", "after"] and table.diversity.nunique() == 2
    assert fingerprint(plain) == before


# --- the command line -----------------------------------------------------------------------------------------------


def test_an_adapter_is_trained_and_measured(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lora_looks, "SCENES", 4)
    out, where = tmp_path / "adapter", ["--model-path", model.spec.source, "--device", "cpu"]
    command = ["lora", "train", "sd3-mini", "--layers", "0", "2", "--rank", "2", "--steps", "2", "--batch", "2"]
    assert cli.main([*command, "--out", str(out), *where]) == 0
    assert "layers 0 2" in capsys.readouterr().out
    assert sorted(os.listdir(out)) == [lora.FILE, lora.ABOUT]
    told = json.loads((out / lora.ABOUT).read_text())["key"]
    assert (told["layers"], told["rank"], told["steps"], told["batch"]) == ([0, 2], 2, 2, 2)
    written = (out / lora.FILE).stat().st_mtime_ns
    assert cli.main([*command, "--out", str(out), *where]) == 0  # done already
    assert (out / lora.FILE).stat().st_mtime_ns == written

    capsys.readouterr()
    ask = ["lora", "eval", "sd3-mini", "--adapter", str(out), "--words", "4", *where]
    assert cli.main([*ask, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["arm"] for row in rows] == ["before", "after"]
    assert {"exact", "named", "open", "obeyed", "typefaces", "materials", "diversity"} <= rows[0].keys()
    monkeypatch.setattr(lora_looks, "measure", lambda *a, **k: pytest.fail("was measured again"))
    assert cli.main(ask) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["arm", "before", "after", "read"]


def test_two_processes_share_the_batch(model, tmp_path):
    """On pictures of the user's own; both see the same text layers, so that one file comes out."""
    data = tmp_path / "data"
    data.mkdir()
    pictures, captions = lora_looks.drawn_scenes(4)
    lines = ["file_name,text"]
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        Image.fromarray(picture).save(data / f"{i}.png")
        lines.append(f'{i}.png,"{caption.replace(chr(34), chr(34) * 2)}"')
    (data / "metadata.csv").write_text("\n".join(lines))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "textloc_utils.cli"]
    command = ["lora", "train", "sd3-mini", "--layers", "1", "--rank", "1", "--steps", "2", "--device", "cpu"]
    options = ["--model-path", model.spec.source, "--data", data, "--out", tmp_path / "out", "--batch"]
    done = subprocess.run([*launch, *command, *options, "4"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("parameters") == 1
    report = json.loads((tmp_path / "out" / lora.ABOUT).read_text())["report"]
    assert len(report["losses"]) == 2 and np.isfinite(report["losses"]).all()


def test_layers_by_name(monkeypatch):
    model = SimpleNamespace(layers=range(12))
    monkeypatch.setattr(experiment, "known_layers", lambda model: (4, 5))
    assert adapters.layers_of(model, ["all"], 0) == tuple(range(12))
    assert adapters.layers_of(model, ["localized"], 0) == (4, 5)
    assert adapters.layers_of(model, ["random"], 1) == sites.random_layers(model, (4, 5), 1)
    assert adapters.layers_of(model, [7, 3], 0) == (3, 7)


def test_bad_input_of_an_adapter_is_one_line(model, tmp_path, capsys):
    out = ["--out", tmp_path / "out"]
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "empty" / "a.png")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / lora.FILE).touch()
    where = ["--model-path", model.spec.source, "--device", "cpu"]
    for arguments, said in (
        (["train", "sd4", *out], "known models"),
        (["train", "sd3-mini", "--layers", "3", *out], "0 to 2"),
        (["train", "sd3-mini", "--layers", "some", *out], "localized, all, random"),
        (["train", "sd3-mini", "--layers", "1", "--rank", 0, *out], "rank"),
        (["train", "sd3-mini", "--layers", "1", "--steps", 0, *out], "steps"),
        (["train", "sd3-mini", "--layers", "1", "--data", tmp_path / "empty", *out], "file_name and text"),
        (["train", "sdxl", "--layers", "1", *out], "needs --data"),
        (["eval", "sd3-mini", "--adapter", tmp_path / "none"], "textloc lora train"),
        (["eval", "sd3-mini", "--adapter", tmp_path / "there", "--words", 0], "from 1 to"),
        (["eval", "sd3-mini", "--adapter", tmp_path / "there", "--words", 3], "from 4 to 600, got 3"),
    ):
        assert said in fails(capsys, "lora", *arguments, *where)
    assert not (tmp_path / "out").exists()


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
