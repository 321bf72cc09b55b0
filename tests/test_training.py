"""The trainer: resumable to the same weights after a kill, and its parts."""

import json
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from textloc_utils import cli
from textloc_utils.miniatures import card, training
from textloc_utils.settings import TextlocError, data_dir

TINY = replace(
    training.Budget(), samples=32, seconds=1e9, autoencoder_seconds=0.5, pool=16, batch=4, evaluations=0, lr=1e-3
)
RUN = """
import sys
from dataclasses import replace
from pathlib import Path
from textloc_utils.miniatures import training
from tests.test_training import TINY
training.train("sd3-mini", Path(sys.argv[1]), budget=replace(TINY, checkpoint_seconds=0), device="cpu")
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A run's folder with its autoencoder and encoded scenes, both of which are trained on the clock."""
    folder = tmp_path_factory.mktemp("prepared")
    training.prepare("sd3-mini", folder, TINY, seed=0, log=lambda line: None)
    return folder


def test_a_killed_run_resumes_to_the_same_weights(prepared, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    shutil.copytree(prepared, whole)
    shutil.copytree(prepared, killed)
    training.train("sd3-mini", whole, budget=TINY, device="cpu", log=lambda line: None)

    root = Path(__file__).parents[1]
    process = subprocess.Popen([sys.executable, "-c", RUN, str(killed)], cwd=root, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (killed / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert (killed / "checkpoint.pt").exists() and not (killed / "pipeline").exists()

    lines = []
    training.train("sd3-mini", killed, budget=TINY, device="cpu", log=lines.append)
    assert any(line.startswith("resumed at step") for line in lines)
    for part in ("transformer/diffusion_pytorch_model.safetensors", "text_encoder_3/model.safetensors"):
        a, b = load_file(whole / "pipeline" / part), load_file(killed / "pipeline" / part)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(TextlocError, match="holds a run of seed 0; name another folder for seed 1"):
        training.train("sd3-mini", killed, budget=TINY, device="cpu", seed=1)


def test_a_run_starts_from_a_shipped_miniature(tmp_path):
    shipped = data_dir() / "miniatures" / "sd3-mini"
    report = training.train(
        "sd3-mini", tmp_path, budget=replace(TINY, samples=4), start=shipped, device="cpu", log=lambda line: None
    )
    assert report["before"]["samples"] == json.loads((shipped / "training.json").read_text())["report"]["samples"]
    for part in ("vae/diffusion_pytorch_model.safetensors", "transformer/diffusion_pytorch_model.safetensors"):
        a, b = load_file(shipped / part), load_file(tmp_path / "pipeline" / part)
        # One step of a warming up learning rate, and half precision, lie between them.
        assert max((a[k].float() - b[k]).abs().max() for k in a) < 1e-3


def test_a_compiled_run_compiles_training_steps_alone_and_changes_nothing(prepared, tmp_path, monkeypatch):
    calls = []  # of compiled passes: are gradients taken?

    def compiled(forward, **options):
        return lambda *args, **kwargs: calls.append(torch.is_grad_enabled()) or forward(*args, **kwargs)

    def evaluate(pipe, spec):
        assert "forward" not in vars(pipe.transformer)
        return {}

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(training, "evaluate", evaluate)
    budget = replace(TINY, samples=8, evaluations=1)
    for name in ("plain", "fast"):
        shutil.copytree(prepared, tmp_path / name)
        training.train(
            "sd3-mini", tmp_path / name, budget=budget, compiled=name == "fast", device="cpu", log=lambda line: None
        )
    assert calls == [True, True]
    a, b = (
        load_file(tmp_path / name / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
        for name in ("plain", "fast")
    )
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_what_a_run_can_start_from(tmp_path):
    with pytest.raises(TextlocError, match="no trained miniature in .*; give a folder of data/miniatures"):
        training.train("sd3-mini", tmp_path / "run", start=tmp_path)
    with pytest.raises(TextlocError, match="holds sd3-mini; ldm-mini can only start from a ldm-mini"):
        training.train("ldm-mini", tmp_path / "run", start=data_dir() / "miniatures" / "sd3-mini")
    assert not (tmp_path / "run").exists()


def test_batches_depend_on_the_step_only(prepared):
    pool = training.Pool(prepared)
    (a, first), (b, second) = (pool.batch(6, (4, 6), random.Random("(0, 7, 0)")) for _ in range(2))
    assert first == second and torch.equal(a, b)
    assert a.shape == (6, 16, 8, 16)


def test_learning_rate_warms_up_and_decays():
    assert training.lr_factor(0.0, 0, 0.4) < 0.02
    assert training.lr_factor(0.3, 1000, 0.4) == 1.0
    assert training.lr_factor(0.8, 1000, 0.4) == pytest.approx(0.5)


def test_unknown_miniature_names_the_known_ones():
    with pytest.raises(TextlocError, match="known miniatures: sd3-mini"):
        training.recipe("sd4-mini")


def test_only_a_miniature_is_replaced_by_a_shipped_one(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("three years")
    monkeypatch.setattr(training, "train", lambda *a, **k: pytest.fail("it trained first"))
    assert cli.main(["train", "sd3-mini", "--out", str(tmp_path / "run"), "--ship", str(tmp_path / "mine")]) == 2
    assert "holds something that is no miniature" in capsys.readouterr().err
    with pytest.raises(TextlocError, match="no miniature"):
        (tmp_path / "run" / "pipeline").mkdir(parents=True)
        (tmp_path / "run" / "pipeline" / "model_index.json").write_text("{}")
        card.export("sd3-mini", tmp_path / "run", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "three years"
