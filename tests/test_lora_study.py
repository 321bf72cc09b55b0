"""The arms are fair, their table is resumed and published, and the command line does what it says."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tiny
from PIL import Image

from textloc_utils import cli, experiment, lora, lora_looks, lora_study, models, prompts
from textloc_utils.cli import adapters
from textloc_utils.experiment import Experiment
from textloc_utils.lora import Training
from textloc_utils.miniatures import scenes
from textloc_utils.results import Store
from textloc_utils.settings import TextlocError

ARMS = ("localized", "all text layers", "random layers", "all attention")
FEW = Training(layers=(), rank=2, steps=2, batch=2)


@pytest.fixture(scope="module")
def model():
    return models.load("sd3-mini", device="cpu")


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Few scenes and prompts; nothing is published into the package's data."""
    monkeypatch.setattr(lora_study, "SCENES", 4)
    monkeypatch.setattr(lora_study, "KIN", (1, 2))
    monkeypatch.setattr(experiment, "data_dir", lambda: tmp_path)


def fails(capsys, *arguments) -> str:
    assert cli.main([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("textloc: ")
    return err


# --- the task and the arms ----------------------------------------------------------------------------------------


def test_the_new_task_holds_no_reported_word():
    pictures, captions = lora_study.drawn_scenes(2000)
    texts = [prompts.quoted_text(caption) for caption in captions]
    assert pictures.shape == (2000, scenes.HEIGHT, scenes.WIDTH, 3) and {len(text) for text in texts} == {7}
    reported = {word for _, word, _ in lora_study.prompts.long_prompts(200)}
    assert reported.isdisjoint(texts) and set(prompts.long_words("train")) & set(texts)
    again = lora_study.drawn_scenes(3)
    assert np.array_equal(again[0], pictures[:3]) and again[1] == captions[:3]


@pytest.mark.parametrize("name", tiny.BUILDERS)
def test_arms_differ_in_their_layers_and_rank_alone(name):
    model = tiny.model(name)
    every = tuple(range(len(model.layers)))
    found = lora_study.arms(model, (1,), 3, FEW)
    names = [name for name in ARMS if name != "all attention" or models.self_attention(model.denoiser)]
    assert [arm.name for arm in found] == 2 * names
    count = lora.parameters(model, replace(FEW, layers=every, rank=lora_study.REFERENCE_RANK))
    for arm in found:
        own = replace(arm.training, layers=(), self_attention=False, rank=FEW.rank)
        assert own == replace(FEW, seed=3)
        if arm.equal == "rank":
            assert arm.training.rank == FEW.rank
        else:
            one = lora.parameters(model, replace(arm.training, rank=1))
            assert abs(lora.parameters(model, arm.training) - count) <= max(one / 2, one - count)
    layers = {arm.name: arm.training.layers for arm in found}
    assert layers["localized"] == (1,) and layers["all text layers"] == every


# --- the table ----------------------------------------------------------------------------------------------------


def test_the_study_is_resumed_and_published(model, small, tmp_path, monkeypatch):
    run = Experiment.of(model, steps=1, store=Store(tmp_path / "units"))
    options = {"training": FEW, "seeds": (0,)}
    train, runs = lora.train, []

    def once_killed(*arguments, **others):
        runs.append(1)
        if len(runs) == 3:
            raise KeyboardInterrupt
        return train(*arguments, **others)

    monkeypatch.setattr(lora, "train", once_killed)
    with pytest.raises(KeyboardInterrupt):
        lora_study.study(run, (4, 5), 2, **options)
    table = lora_study.study(Experiment.of(run, publish=True), (4, 5), 2, **options)
    # Two of five were kept: all layers have the same rank in both comparisons. Then all five take turns for their time.
    assert len(runs) == 3 + 3 + 5 * lora_study.ROUNDS
    assert not getattr(model.denoiser, "peft_config", None)

    arms = [name for name in ARMS if name != "all attention"]
    assert table.arm.tolist() == [lora_study.BEFORE, *arms, *arms] and set(table.model) == {"sd3-mini"}
    assert table.equal.tolist() == ["", *["rank"] * 3, *["parameters"] * 3]
    trained = table[table.arm != lora_study.BEFORE]
    assert (trained.saved_bytes > 0).all() and (trained.seconds_per_step > 0).all()
    assert all(len(losses.split()) == FEW.steps for losses in trained.losses)
    for task in ("new", "old"):
        scores = table[f"{task}_scores"].map(lambda text: np.mean([float(s) for s in text.split()]))
        np.testing.assert_allclose(scores, table[f"{task}_score"], atol=1e-4)
    assert trained.set_index(["arm", "equal"]).layers["localized", "rank"] == "4 5"

    monkeypatch.setattr(lora_study, "measure", lambda *a, **k: pytest.fail("was done again"))
    run = Experiment.of(run, store=Store(tmp_path / "other"))
    assert lora_study.study(run, [5, 4], 2, **options).equals(table)
    for other in ({"training": replace(FEW, lr=1.0)}, {"seeds": (1,)}):
        with pytest.raises(pytest.fail.Exception):
            lora_study.study(run, (4, 5), 2, **options | other)
    with pytest.raises(pytest.fail.Exception):
        lora_study.study(Experiment.of(run, steps=2), (4, 5), 2, **options)


def test_a_wrong_study_is_refused(model):
    with pytest.raises(TextlocError, match="at least one"):
        lora_study.study(Experiment.of(model), (), 2)
    with pytest.raises(TextlocError, match="0 to 11"):
        lora_study.study(Experiment.of(model), (12,), 2)
    with pytest.raises(TextlocError, match="asked for 999"):
        lora_study.study(Experiment.of(model), (4,), 999)


def rows(scores: dict) -> pd.DataFrame:
    """A study's table from text scores {(arm, equal): one list of words per training seed}."""
    zero = dict.fromkeys(("rank", "parameters", "seconds_per_step", "saved_bytes", "new_exact", "old_exact"), 0)
    return pd.DataFrame(
        {
            "arm": arm,
            "equal": equal,
            "seed": seed,
            "layers": str(seed % 2),
            "diversity": seed,
            "losses": "1 0.5",
            **zero,
        }
        | {f"{task}_scores": " ".join(map(str, words)) for task in ("new", "old")}
        for (arm, equal), runs in scores.items()
        for seed, words in enumerate(runs)
    )


def test_short_tables_average_over_seeds_and_words():
    table = rows(
        {
            (lora_study.BEFORE, ""): [[0.0, 0.2]],
            ("localized", "rank"): [[0.5, 0.7], [0.6, 0.8], [0.7, 0.9]],
            ("random layers", "rank"): [[0.4, 0.6], [0.5, 0.7], [0.6, 0.8]],
        }
    )
    short = lora_study.summarise(table).set_index("arm")
    assert short.new["localized"] == pytest.approx(0.7) and short.new["before"] == pytest.approx(0.1)
    assert short.new_low["localized"] < 0.65 and short.new_high["localized"] > 0.75
    assert short.layers["localized"] == "0, 1" and short.diversity["localized"] == 1 and short.seeds["localized"] == 3
    # The diversities are 0, 1 and 2: their deviation is 1, and Student's quantile of two degrees of freedom 4.303.
    ends = short.loc["localized", ["diversity_low", "diversity_high"]].tolist()
    assert ends == pytest.approx([1 - 4.303 / 3**0.5, 1 + 4.303 / 3**0.5], abs=1e-3)
    assert (short.diversity_low["before"], short.diversity_high["before"]) == (0, 0)
    # The same words and seeds on both sides: the difference is .1 wherever one looks.
    (row,) = lora_study.advantages(table).to_dict("records")
    assert (row["arm"], row["equal"]) == ("random layers", "rank")
    np.testing.assert_allclose([row["new"], row["new_low"], row["new_high"], row["old"]], 0.1)
    steps = lora_study.curves(table)
    assert steps.loss.tolist() == [1.0, 0.75, 1.0, 0.75] and steps.step.tolist() == [1, 2, 1, 2]


# --- the command line ---------------------------------------------------------------------------------------------


def test_an_adapter_is_trained_and_measured(small, tmp_path, capsys, monkeypatch):
    out = tmp_path / "adapter"
    command = ["lora", "train", "sd3-mini", "--layers", "4", "6", "--rank", "2", "--steps", "2", "--batch", "2"]
    assert cli.main([*command, "--out", str(out), "--device", "cpu"]) == 0
    assert "layers 4 6" in capsys.readouterr().out
    assert sorted(os.listdir(out)) == [lora.FILE, lora.ABOUT]
    told = json.loads((out / lora.ABOUT).read_text())["key"]
    assert (told["layers"], told["rank"], told["steps"], told["batch"]) == ([4, 6], 2, 2, 2)
    written = (out / lora.FILE).stat().st_mtime_ns
    assert cli.main([*command, "--out", str(out), "--device", "cpu"]) == 0  # done already
    assert (out / lora.FILE).stat().st_mtime_ns == written

    original = lora_study.measure
    monkeypatch.setattr(lora_study, "measure", lambda run, *a: original(replace(run, steps=1), *a))
    capsys.readouterr()
    ask = ["lora", "eval", "sd3-mini", "--adapter", str(out), "--words", "2", "--device", "cpu"]
    assert cli.main([*ask, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["arm"] for row in rows] == ["before", "after"]
    assert {"new_score", "new_exact", "old_score", "old_exact", "diversity"} <= rows[0].keys()
    assert rows[0]["diversity"] != rows[1]["diversity"]
    monkeypatch.setattr(lora_study, "measure", lambda *a, **k: pytest.fail("was measured again"))
    assert cli.main(ask) == 0 and "after" in capsys.readouterr().out


def test_two_processes_share_the_batch(tmp_path):
    """On pictures of the user's own; both see the same text layers, so that one file comes out."""
    data = tmp_path / "data"
    data.mkdir()
    pictures, captions = lora_study.drawn_scenes(4)
    lines = ["file_name,text"]
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        Image.fromarray(picture).save(data / f"{i}.png")
        lines.append(f'{i}.png,"{caption.replace(chr(34), chr(34) * 2)}"')
    (data / "metadata.csv").write_text("\n".join(lines))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "textloc_utils.cli"]
    command = ["lora", "train", "sd3-mini", "--layers", "9", "--rank", "1", "--steps", "2", "--device", "cpu"]
    options = ["--data", data, "--out", tmp_path / "out", "--batch"]
    done = subprocess.run([*launch, *command, *options, "4"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("parameters") == 1
    report = json.loads((tmp_path / "out" / lora.ABOUT).read_text())["report"]
    assert len(report["losses"]) == 2 and np.isfinite(report["losses"]).all()


def test_layers_by_name(model, monkeypatch):
    monkeypatch.setattr(experiment, "known_layers", lambda model: (4, 5))
    assert adapters.layers_of(model, ["all"], 0) == tuple(range(12))
    assert adapters.layers_of(model, ["localized"], 0) == (4, 5)
    assert adapters.layers_of(model, ["random"], 1) == lora_looks.random_layers(model, (4, 5), 1)
    assert adapters.layers_of(model, [7, 3], 0) == (3, 7)


def test_bad_input_of_an_adapter_is_one_line(tmp_path, capsys):
    out = ["--out", tmp_path / "out"]
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "empty" / "a.png")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / lora.FILE).touch()
    for arguments, said in (
        (["train", "sd4", *out], "known models"),
        (["train", "sd3-mini", "--layers", "12", *out], "0 to 11"),
        (["train", "sd3-mini", "--layers", "some", *out], "localized, all, random"),
        (["train", "sd3-mini", "--layers", "4", "--rank", 0, *out], "rank"),
        (["train", "sd3-mini", "--layers", "4", "--steps", 0, *out], "steps"),
        (["train", "sd3-mini", "--layers", "4", "--data", tmp_path / "empty", *out], "file_name and text"),
        (["eval", "sd3-mini", "--adapter", tmp_path / "none"], "textloc lora train"),
        (["eval", "sd3-mini", "--adapter", tmp_path / "there", "--words", 0], "from 1 to"),
    ):
        assert said in fails(capsys, "lora", *arguments, "--device", "cpu")
    assert "0 to 11" in fails(capsys, "study", "lora", "sd3-mini", "--layers", "12", "--device", "cpu")
    assert not (tmp_path / "out").exists()


def test_the_command_prints_a_line_per_run(capsys, monkeypatch):
    monkeypatch.setattr(lora_study, "measure", lambda *a, **k: {"new_score": 0.25, "old_score": 0.5, "diversity": 3.0})
    monkeypatch.setattr(lora, "train", lambda model, data, training, **k: _report(model, training))
    monkeypatch.setattr(lora_study, "SCENES", 2)
    assert cli.main(["study", "lora", "sd3-mini", "--layers", "4", "--preset", "smoke", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 1 + 2 * 3 * len(lora_study.SEEDS) + 1 and "0.250" in lines[-2] and "before" in lines[1]
    assert lines[-1].startswith("read by tesseract")


def _report(model, training):
    count = lora.parameters(model, training)
    return lora.Report(parameters=count, losses=[1.0], seconds_per_step=0.1, saved_bytes=1, peak_bytes=None)
