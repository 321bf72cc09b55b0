"""The command line, run as a user runs it: output, and one line with exit status 2 for every mistake."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from textloc_utils import cli, edit, localization, models, ocr, prompts, scene_pairs
from textloc_utils.settings import PRESETS, TextlocError, data_dir

HELLO = 'A blue sign against brick says "HELLO" in plain white letters.'


def run(*arguments, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "textloc_utils.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=300,
    )


def fails(capsys, *arguments) -> str:
    """The one line of an error; asserts exit status 2 and nothing on stdout."""
    assert cli.main([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("textloc: ")
    return err


@pytest.mark.full
def test_generate_writes_what_it_prints(tmp_path):
    words = ["HELLO", "WORLD"]
    asked = [prompts.replace_text(HELLO, w) for w in words]
    done = run("generate", "sd3-mini", *asked, "--seed", 7, "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert rows == json.loads((tmp_path / "out" / "images.json").read_text())
    assert [r["prompt"] for r in rows] == asked and {r["seed"] for r in rows} == {7}
    assert all(set(r) == {"prompt", "seed", "file", "ocr", "text_found", "reader"} for r in rows)
    assert {r["reader"] for r in rows} == {ocr.reader("tesseract")}
    assert Image.open(tmp_path / "out" / rows[0]["file"]).size == (128, 64)
    assert sorted(os.listdir(tmp_path / "out")) == ["000.png", "001.png", "images.json"]
    assert done.stderr == ""


def test_the_same_seed_draws_the_same_picture(tmp_path, capsys):
    for name in ("a", "b"):
        assert cli.main(["generate", "sd3-mini", HELLO, "--out", str(tmp_path / name), "--steps", "3"]) == 0
    assert (tmp_path / "a/000.png").read_bytes() == (tmp_path / "b/000.png").read_bytes()


def test_models_lists_what_the_book_needs(capsys):
    assert cli.main(["models", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert {"sd3-mini", "sdxl", "if", "sd3"} <= rows.keys()
    for row in rows.values():
        assert {"name", "family", "pipeline", "parameters", "text_layers", "kv_share"} <= row.keys()
        assert len(row["text_layers"]) == len(row["kv_share"])
        ground = "{material}" if row["name"] in models.MINIATURES else "{wall}"
        assert all(part in row["prompt_template"] for part in (ground, "{sign}", "{text}"))
    trained = rows["sd3-mini"]["trained"]
    assert trained["device"] and trained["samples"] > 0 and 0 < trained["test"]["exact"]["mean"] <= 1


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["models"],
        ["generate"],
        ["localize"],
        ["study"],
        ["study", "layers"],
        ["study", "contents"],
        ["study", "trainings"],
        ["study", "edit"],
        ["study", "toxic"],
        ["study", "looks"],
        ["run"],
        ["strip"],
        ["explore"],
        ["lora"],
        ["lora", "train"],
        ["lora", "eval"],
        ["edit"],
        ["guard"],
        ["train"],
    ],
)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code == 0 and "usage: textloc" in capsys.readouterr().out


def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert "known models" in fails(capsys, "generate", "sd4", HELLO, "--out", out)
    assert "double quotes" in fails(capsys, "generate", "sd3-mini", "a sign", "--out", out)
    long = prompts.replace_text(HELLO, "A" * 40)
    assert "too long" in fails(capsys, "generate", "sd3-mini", long, "--out", out)
    assert "from 1 to 1000" in fails(capsys, "generate", "sd3-mini", HELLO, "--steps", 0, "--out", out)
    assert "known miniatures" in fails(capsys, "train", "sd4-mini", "--out", out)
    (tmp_path / "file").touch()
    assert "not a folder" in fails(capsys, "generate", "sd3-mini", HELLO, "--out", tmp_path / "file" / "out")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "CUDA" in fails(capsys, "generate", "sd3-mini", HELLO, "--device", "cuda", "--out", out)
    assert "CUDA" in fails(capsys, "train", "sd3-mini", "--device", "cuda", "--out", out)
    assert "unknown device" in fails(capsys, "train", "sd3-mini", "--device", "gpu", "--out", out)
    assert not out.exists()


def test_bad_input_of_a_localization_is_one_line(tmp_path, capsys):
    prompt_file = tmp_path / "prompts.txt"
    prompt_file.write_text('A sign that says "ONE".\nA sign without.\n')
    for arguments, said in (
        (["sd4"], "known models"),
        (["sd3-mini", "--pairs", 0], "from 1 to"),
        (["sd3-mini", "--prompts", tmp_path / "none.txt"], "cannot read"),
        (["sd3-mini", "--prompts", prompt_file], "double quotes"),
        (["sd3-mini", "--reach", 2], "above 0 to 1"),
        (["sd3-mini", "--budget", 0], "budget"),
        (["sd3-mini", "--by", "letters"], "--by"),
        (["sd3-mini", "--by", "exact", "--search", "one-step"], "needs pictures"),
    ):
        assert said in fails(capsys, "localize", *arguments)


def test_a_localization_by_whole_words_is_asked_for_as_such(tmp_path, monkeypatch):
    monkeypatch.setenv("TEXTLOC_RESULTS", str(tmp_path))
    asked = {}

    def stop(_experiment, _pairs, **settings):
        asked.update(settings)
        raise TextlocError("seen")

    monkeypatch.setattr(localization, "localize", stop)
    for by in ("exact", "score"):
        assert cli.main(["localize", "sd3-mini", "--by", by, "--preset", "smoke", "--pairs", "1"]) == 2
        assert asked["by"] == by


def test_bad_input_of_a_guard_is_one_line_and_writes_nothing(tmp_path, capsys):
    out, words, empty = tmp_path / "out", tmp_path / "words.txt", tmp_path / "empty.txt"
    words.write_text("two words\n")
    empty.write_text("\n")
    for arguments, said in (
        (["sd4", "--prompt", HELLO], "known models"),
        (["sd3-mini", "--file", tmp_path / "none.txt"], "cannot read"),
        (["sd3-mini", "--file", empty], "no prompt"),
        (["sd3-mini", "--prompt", HELLO, "--words", words], "one word"),
        (["sd3-mini", "--prompt", HELLO, "--layers", 12], "0 to 11"),
        (["sd3-mini", "--prompt", HELLO, "--steps", 0], "from 1 to 1000"),
        (["sd3-mini", "--prompt", prompts.replace_text(HELLO, "A" * 40), "--layers", 4], "too long"),
        (["sdxl-mini", "--prompt", HELLO, "--layers", -1], "whole number"),
    ):
        assert said in fails(capsys, "guard", *arguments, "--out", out)
    assert "out of range" in fails(capsys, "study", "toxic", "sd3-mini", "--layers", 12)
    assert not out.exists()


def test_guard_draws_a_file_of_prompts(tmp_path, capsys):
    file, words = tmp_path / "prompts.txt", tmp_path / "words.txt"
    file.write_text(f"{HELLO}\n\n{prompts.replace_text(HELLO, 'S T U P 1 D')}\n")
    words.write_text("stupid\n")
    arguments = ["guard", "sd3-mini", "--file", file, "--words", words, "--steps", 2, "--out", tmp_path / "out"]
    assert cli.main([*map(str, arguments), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows == json.loads((tmp_path / "out/images.json").read_text())
    assert [row["found"] for row in rows] == [[], ["STUPID"]] and rows[0]["cleaned"] == HELLO
    assert sorted(os.listdir(tmp_path / "out")) == ["000.png", "001.png", "images.json"]
    assert cli.main(list(map(str, arguments))) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 3 and "found STUPID" in said and said.endswith(f"read by {ocr.reader('tesseract')}\n")


def test_localize_prints_what_scripts_need(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TEXTLOC_RESULTS", str(tmp_path))
    assert (
        cli.main(["localize", "sd3-mini", "--search", "one-step", "--preset", "smoke", "--pairs", "2", "--json"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert {"layers", "effects", "score", "share", "pairs", "row_evaluations", "seconds"} <= found.keys()
    assert len(found["effects"]) == 12 and set(found["layers"]) <= set(range(12)) and found["pairs"] == 2


@pytest.mark.full
def test_missing_tesseract_is_named(tmp_path):
    done = run("generate", "sd3-mini", HELLO, "--out", tmp_path / "out", PATH=str(tmp_path))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "install tesseract" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["missing", "corrupt"])
def test_damaged_weights_are_named(damage, tmp_path, capsys, monkeypatch):
    copy = tmp_path / "data"
    shutil.copytree(data_dir() / "miniatures" / "sd3-mini", copy / "miniatures" / "sd3-mini")
    file = copy / "miniatures/sd3-mini/transformer/diffusion_pytorch_model.safetensors"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:1000])
    monkeypatch.setenv("TEXTLOC_DATA", str(copy))
    assert "transformer" in fails(capsys, "generate", "sd3-mini", HELLO, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_several_noises_and_other_settings(tmp_path, capsys):
    """Every prompt is drawn from each noise; guidance and negative prompt change the picture."""
    drawing = ["--steps", "2", "--json"]
    words = ["generate", "sdxl-mini", HELLO, "--out", str(tmp_path / "a"), "--noises", "2", *drawing]
    assert cli.main(words) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["seed"] for row in rows] == [42, 43] and rows[0]["prompt"] == rows[1]["prompt"]
    other = ["--guidance", "3", "--negative-prompt", "A blue sign"]
    assert cli.main(["generate", "sdxl-mini", HELLO, "--out", str(tmp_path / "b"), *other, *drawing]) == 0
    first, second, changed = ((tmp_path / n).read_bytes() for n in ("a/000.png", "a/001.png", "b/000.png"))
    assert len({first, second, changed}) == 3


def test_what_a_model_cannot_tell_apart_is_one_line(tmp_path, capsys):
    """Both texts are unknown to the tokenizer, which gives the same tokens for them."""
    file = tmp_path / "prompts.txt"
    file.write_text('A sign that says "\u00c9".\nA sign that says "\u00d1".\n')
    said = fails(capsys, "localize", "sd3-mini", "--prompts", file, "--pairs", 1)
    assert "cannot read" in said  # the reader is asked before the model is loaded
    model = models.load("sd3-mini", device="cpu")
    (pair,) = prompts.load_pairs(file, 1)
    for ask in (lambda: localization.localize(model, [pair]), lambda: edit.report(model, pair, edit.localized([4]))):
        with pytest.raises(TextlocError, match="have the same tokens in"):
            ask()
    models.check_distinct(model, scene_pairs.for_model(model, 8, "report"))


def test_a_miniature_has_one_size(tmp_path, capsys):
    words = ["generate", "sd3-mini", HELLO, "--out", tmp_path / "out", "--height", 128]
    assert "only pictures of 128x64 pixels" in fails(capsys, *words) and not (tmp_path / "out").exists()


def test_presets_have_the_papers_sizes():
    paper, book = PRESETS["paper"], PRESETS["book"]
    pairs = prompts.pairs_of(paper.sets, paper.pairs)
    assert len(pairs) == len({pair.seed for pair in pairs}) == 200
    assert ["wall" not in pair.source for pair in pairs] == [True] * 100 + [False] * 100
    assert (paper.edits, paper.words, paper.noises) == (300, 400, 4)
    drawn = prompts.with_noises(prompts.make_pairs(paper.edits), paper.noises)
    assert len({pair.seed for pair in drawn}) == 1200 and len({pair.source for pair in drawn}) <= 300
    assert prompts.pairs_of(book.sets, 5, 7) == prompts.with_noises(prompts.make_pairs(5, 7), book.noises)
    with pytest.raises(TextlocError, match="noises"):
        prompts.with_noises(pairs, 0)


def test_help_imports_nothing_heavy():
    heavy = ["torch", "diffusers", "transformers", "numpy", "pandas", "scipy", "matplotlib", "PIL"]
    code = f"import sys; from textloc_utils.cli import parser; parser(); print(set({heavy}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
