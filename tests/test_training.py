"""The trainer: resumable to the same weights after a kill, shared parts, and what it refuses before it begins."""

import ast
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from textloc_utils import cli, prompts
from textloc_utils.miniatures import autoencoder, card, data, evaluation, parts, training, world
from textloc_utils.settings import TextlocError

TINY = training.Budget(
    samples=32, autoencoder_steps=2, encoder_steps=2, pool=18, batch=4, evaluations=0, pairs=1, lr=1e-3
)
RUN = """
import sys
from dataclasses import replace
from pathlib import Path
from textloc_utils.miniatures import training
from tests.test_training import TINY
folder, cache = map(Path, sys.argv[1:])
training.train("sd3-mini", folder, budget=replace(TINY, checkpoint_seconds=1e-9), device="cpu", cache=cache)
"""


def quietly(line):
    """A log that nobody reads."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The folder of the parts that the tests' runs share."""
    return tmp_path_factory.mktemp("parts")


def train(folder, cache, **how):
    return training.train("sd3-mini", folder, **{"budget": TINY, "device": "cpu", "cache": cache, "log": quietly} | how)


def weights(folder):
    return load_file(folder / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_an_autoencoder_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(autoencoder, "CHECKPOINT_SECONDS", 0.0)

    def once(name, log=quietly):
        torch.manual_seed(0)
        vae = autoencoder.build(4)
        autoencoder.train(vae, tmp_path / name, steps=4, batch=2, log=log)
        return vae.state_dict()

    def killed_at_step_3(line):
        if "step 3:" in line:
            raise KeyboardInterrupt

    whole = once("whole")
    with pytest.raises(KeyboardInterrupt):
        once("killed", killed_at_step_3)
    lines = []
    assert same(whole, once("killed", lines.append))
    assert lines[0] == "autoencoder resumed at step 2"


def test_a_killed_run_resumes_to_the_same_weights(cache, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(whole, cache)
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(killed), str(cache)], cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 240
    while not (killed / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert (killed / "checkpoint.pt").exists() and not (killed / "pipeline").exists()
    lines = []
    train(killed, cache, log=lines.append)
    assert any(line.startswith("resumed at step") for line in lines)
    assert same(weights(whole), weights(killed))


def test_other_settings_do_not_go_on_with_a_run(cache, tmp_path):
    train(tmp_path, cache)
    before = weights(tmp_path)
    for change, message in (
        ({"seed": 1}, "holds a run with seed 0, not 1"),
        ({"budget": replace(TINY, batch=8)}, "holds a run with batch 4, not 8"),
        ({"only": world.PLAIN}, "holds a run with world second, not plain"),
    ):
        with pytest.raises(TextlocError, match=message):
            train(tmp_path, cache, **change)
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    with pytest.raises(TextlocError, match=r"checkpoint.pt is damaged; delete it"):
        train(tmp_path, cache)
    assert same(before, weights(tmp_path))


def test_a_folder_of_something_else_is_left_alone(cache, tmp_path):
    (tmp_path / "thesis.tex").write_text("three years")
    with pytest.raises(TextlocError, match="holds files that are not of a training run"):
        train(tmp_path, cache)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_parts_are_made_once_and_by_their_inputs(tmp_path):
    made = [parts.make_encoder("t5", folder=tmp_path, steps=2, seed=0, device="cpu", log=quietly)[0] for _ in "ab"]
    assert made[0] == made[1]
    file = made[0] / "model.safetensors"
    before = file.stat().st_mtime_ns
    other = parts.make_encoder("t5", folder=tmp_path, steps=3, seed=0, device="cpu", log=quietly)[0]
    assert other != made[0] and file.stat().st_mtime_ns == before


def test_only_the_denoiser_is_trained(cache, tmp_path):
    train(tmp_path, cache)
    where = json.loads((tmp_path / "parts.json").read_text())
    for component in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        one = load_file(tmp_path / "pipeline" / component / "model.safetensors")
        assert same(one, load_file(Path(where[component]["folder"]) / "model.safetensors"))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["samples"] == 32 and set(report["parts"]) == {*where} and report["world"] == "second"


def test_a_compiled_run_compiles_training_steps_alone_and_changes_nothing(cache, tmp_path, monkeypatch):
    calls = []  # of compiled passes: are gradients taken?

    def compiled(forward, **options):
        return lambda *args, **kwargs: calls.append(torch.is_grad_enabled()) or forward(*args, **kwargs)

    def evaluate(pipe, spec, **options):
        assert "forward" not in vars(pipe.transformer)
        return {"exact": 0.0, "characters": 0.0}

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(training, "evaluate", evaluate)
    budget = replace(TINY, samples=8, evaluations=1)
    for name in ("plain", "fast"):
        train(tmp_path / name, cache, budget=budget, compiled=name == "fast")
    assert calls == [True, True]
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "fast"))


def test_evaluations_are_dense_while_letters_bind_and_early_denoisers_are_kept(cache, tmp_path, monkeypatch):
    # Exact spelling after each evaluation; letters bind from the third to the fifth.
    course = iter([0.0, 0.0, 0.3, 0.6, 0.72, 0.95, *[1.0] * 5])

    def evaluate(pipe, spec, **options):
        exact = next(course)
        return {"exact": exact, "characters": min(1.0, exact + 0.05)}

    monkeypatch.setattr(training, "evaluate", evaluate)
    train(tmp_path, cache, budget=replace(TINY, samples=128, evaluations=8))
    seen = [e["samples"] for e in json.loads((tmp_path / "evaluations.json").read_text())]
    assert seen == [16, 32, 48, 56, 64, 80, 96, 112, 128]
    assert sorted(os.listdir(tmp_path / "early")) == ["48", "56", "64"]
    kept = load_file(tmp_path / "early" / "48" / "denoiser.safetensors")
    assert kept.keys() == weights(tmp_path).keys() and not same(kept, weights(tmp_path))


def test_a_loss_that_is_not_finite_ends_the_run(cache, tmp_path, monkeypatch):
    rules = training.recipe("sd3-mini")
    monkeypatch.setattr(rules.Objective, "forward", lambda self, *_: self.denoiser.proj_out.weight.sum() * float("nan"))
    with pytest.raises(TextlocError, match="the loss is nan at step 0; start again with a lower --lr than 0.001"):
        train(tmp_path, cache)
    assert not (tmp_path / "pipeline").exists() and not (tmp_path / "checkpoint.pt").exists()


def test_batches_depend_on_the_step_only(cache, tmp_path):
    train(tmp_path, cache)
    pool = data.Pool(tmp_path, world.SECOND)
    for easy in (False, True):
        (a, first, at), (b, second, there) = (pool.batch(6, 0.5, easy, 0.0, random.Random("(0, 7, 0)")) for _ in "ab")
        assert first == second and torch.equal(a, b) and torch.equal(at, there)
        assert a.shape == (6, 16, 8, 16) and at.shape == (6, 1, 8, 16)


def test_more_captions_name_everything_where_the_curriculum_says_so():
    told = {}
    for named in (0.0, 0.5, 1.0):
        _, captions, _ = data.Drawn(world.SECOND).batch(400, 0.1, False, named, random.Random(0))
        told[named] = np.mean([any(face in caption.split() for face in world.TYPEFACES) for caption in captions])
    # A tenth of the captions are empty; a fifth of the others name the typeface by themselves.
    assert told[0.0] == pytest.approx(0.18, abs=0.05) and told[1.0] == pytest.approx(0.9, abs=0.05)
    assert told[0.5] == pytest.approx(0.9 * 0.6, abs=0.07)


def test_the_cells_of_the_letters_are_where_letters_are():
    scene = world.Scene(text="OAK", ink="black", sign="white", dy=-4)
    blank = replace(scene, ink="white", sign="white")
    changed = (world.render(scene) != world.render(blank)).any(-1)
    cells = data.letter_cells([scene, blank], 1)
    assert cells.shape == (2, 1, world.HEIGHT, world.WIDTH) and not changed[cells[0, 0].numpy() == 0].any()
    assert changed.any() and cells[0].sum() == 3 * world.PITCH * world.CELL_HEIGHT
    coarse = data.letter_cells([scene], 8)[0, 0]
    # A place of the latents counts if any of its pixels does.
    wanted = cells[0, 0].reshape(world.HEIGHT // 8, 8, world.WIDTH // 8, 8).amax((1, 3))
    assert torch.equal(coarse, wanted)


def test_easy_scenes_have_one_typeface_and_words_at_the_left():
    rng = random.Random(0)
    for kind in data.KINDS:
        drawn = [data.draw_scene(rng, kind, world.SECOND) for _ in range(60)]
        looks = {(s.typeface, s.column) for s in drawn}
        assert (looks == {("plain", 0)}) == kind.startswith("easy")
        assert ({s.ink for s in drawn} == {"black", "white"}) == kind.startswith("easy")
        assert any(len(set(s.text)) > 3 for s in drawn) != kind.endswith("runs")
        assert len({s.material for s in drawn}) == len(world.MATERIALS)


def test_learning_rate_warms_up_and_decays():
    assert training.lr_factor(0.0, 0, 0.4) < 0.02
    assert training.lr_factor(0.3, 1000, 0.4) == 1.0
    assert training.lr_factor(0.8, 1000, 0.4) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 0}, "samples must be a whole number of at least 1, got 0"),
        ({"samples": 2.5}, "samples must be a whole number"),
        ({"pool": 1}, "pool must be a whole number of at least 2"),
        ({"evaluations": -1}, "evaluations must be a whole number of at least 0"),
        ({"lr": float("nan")}, "lr must be above 0"),
        ({"lr": float("inf")}, "lr must be above 0"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"encoder_steps": 0}, "encoder steps must be"),
        ({"autoencoder_steps": 0}, "autoencoder steps must be"),
        ({"batch": -3}, "batch must be"),
        ({"decay": 2.0}, "decay must be above 0"),
    ],
)
def test_wrong_budgets_are_refused(change, message):
    with pytest.raises(TextlocError, match=message):
        replace(TINY, **change)


@pytest.mark.parametrize("seed", [-1, 2**31, 1.5])
def test_wrong_seeds_are_refused(seed, tmp_path):
    with pytest.raises(TextlocError, match="the seed must be a whole number from 0"):
        training.train("sd3-mini", tmp_path / "run", seed=seed)
    assert not (tmp_path / "run").exists()


def test_unknown_miniature_names_the_known_ones():
    with pytest.raises(TextlocError, match="known miniatures: sd3-mini"):
        training.recipe("sd4-mini")


def test_only_a_miniature_is_replaced_by_a_shipped_one(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("three years")
    monkeypatch.setattr(training, "train", lambda *a, **k: pytest.fail("it trained first"))
    assert cli.main(["train", "sd3-mini", "--out", str(tmp_path / "run"), "--ship", str(tmp_path / "mine")]) == 2
    assert "holds files that are not of a miniature" in capsys.readouterr().err
    assert cli.main(["train", "sd3-mini", "--out", str(tmp_path / "run"), "--ship", ""]) == 2
    assert "--ship" in capsys.readouterr().err
    with pytest.raises(TextlocError, match="not of a miniature"):
        (tmp_path / "run" / "pipeline").mkdir(parents=True)
        (tmp_path / "run" / "pipeline" / "model_index.json").write_text("{}")
        card.export("sd3-mini", tmp_path / "run", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "three years"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeing", "3"], "a run for a study is not a miniature of the book; add --no-ship"),
        (["--world", "plain"], "a run for a study"),
        (["--layers", "6"], "a run for a study"),
        (["--text", "random"], "a run for a study"),
        (["--no-ship", "--ship", "elsewhere"], "give --ship or --no-ship, not both"),
    ],
)
def test_runs_for_studies_are_not_shipped_by_accident(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "train", lambda *a, **k: pytest.fail("it trained first"))
    assert cli.main(["train", "sd3-mini", "--out", str(tmp_path / "run"), *options]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_text_encoders_of_a_study(tmp_path, cache):
    with pytest.raises(
        TextlocError, match="text encoders of ldm-mini cannot be random; they can be chosen only for sd3-mini"
    ):
        training.train("ldm-mini", tmp_path / "run", text="random")
    with pytest.raises(TextlocError, match="planted layers need one letter per token"):
        training.train("sd3-mini", tmp_path / "run", text="subwords", seeing=(3,))
    assert not (tmp_path / "run").exists()
    report = train(tmp_path / "run", cache, text="subwords")
    assert report["text"] == "subwords" and report["parts"]["text_encoder_3"]["inputs"]["kind"] == "t5-subwords"
    index = json.loads((tmp_path / "run" / "pipeline" / "tokenizer_3" / "tokenizer.json").read_text())
    assert "th" in index["model"]["vocab"]
    with pytest.raises(TextlocError, match="holds a run with text subwords, not None"):
        train(tmp_path / "run", cache)


def test_only_some_recipes_have_a_choice_of_layers(tmp_path):
    with pytest.raises(TextlocError, match="ldm-mini has a fixed number of layers"):
        training.train("ldm-mini", tmp_path / "run", layers=6)
    assert not (tmp_path / "run").exists()


# --- test words are for what is reported -------------------------------------------------------------------------


def test_training_and_its_evaluations_never_read_the_test_words(cache, tmp_path, monkeypatch):
    prompts.random_string(random.Random(0), 3)  # which leaves them out, and so has to know them
    read = prompts.words

    def words(split):
        assert split != "held-out", "a training run read the test words"
        return read(split)

    monkeypatch.setattr(prompts, "words", words)
    for name in ("test_words", "make_pairs"):
        monkeypatch.setattr(prompts, name, lambda *a, name=name, **k: pytest.fail(f"a training run called {name}"))
    for key, value in {"WORDS": 2, "STEPS": 1, "SPELLS": -1.0}.items():
        monkeypatch.setattr(evaluation, key, value)
    train(tmp_path, cache, budget=replace(TINY, samples=4, evaluations=1))
    assert json.loads((tmp_path / "evaluations.json").read_text())[0]["all_layers"] >= 0


def test_only_the_card_names_the_test_words():
    folder = Path(card.__file__).parent
    for path in folder.glob("*.py"):
        names = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
        assert path.name == "card.py" or "held-out" not in names, path.name


def test_validation_pairs_share_no_letter_at_a_place():
    pairs = evaluation.validation_pairs(20)
    known = set(prompts.words("validation"))
    assert all({a, b} <= known and len(a) == len(b) and not any(map(str.__eq__, a, b)) for a, b in pairs)
