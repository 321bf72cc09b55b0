"""Hundreds of command lines, right and wrong: a wrong one is answered in one line with exit status 2, before any model
is loaded, and writes nothing; a right one gets as far as the model."""

import json
import os

import pytest
from PIL import Image

from textloc_utils import cli, models, prompts
from textloc_utils.cli import options
from textloc_utils.settings import TextlocError

HELLO = 'A red sign on a blue wall that says "HELLO".'
SURROGATE = "caf\udce9"  # how Python shows a byte that is not UTF-8

WHOLE = [
    "-1",
    "1.5",
    "nan",
    "inf",
    "1e3",
    "",
    " ",
    "x",
    "\uff11\uff12",
    "1_000",
    "9" * 20,
    "9" * 5000,
    "0x10",
    "\u0663",
]
REAL = ["nan", "inf", "-inf", "-1", "1e400", "1e30", "x", "", "1,5", "NaN", "--", "0x1p3"]
TYPED = ["nothing", "", " ", "BOOK", "../book", SURROGATE]
DEVICES = ["gpu", "cuda:x", "meta", "xpu", "cpu:0", "CUDA", "", "cuda:", "cuda:-1", "privateuseone", "cuda\n", "mps:1"]
MODELS = ["sd4", "", "sd3-mini ", "SD3-MINI", "../sd3-mini", "sd3-mini\n", "a" * 3000, SURROGATE]
PROMPTS = [
    "a sign",
    "",
    'says "" here',
    'says "A" and "B"',
    'says "A',
    f'says "{SURROGATE}"',
    'says "\0"',
    'says "2024"',
    'says "CAF\u00c9"',
    'says "\u4f60\u597d"',
    'says "' + "\n" + '"',
]
NEW = ["", " ", "HELLO", "hello", "2024", "TOOLONGTEXT", 'A"B', "A\nB", "\u00c9T\u00c9", SURROGATE, "A\0"]


def places(tmp_path):
    """Folders and files that exist, and names that nothing can be written to."""
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone" / "away")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80" * 9)
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "unquoted").write_text('A sign that says "ONE".\nA sign without.\n')
    (tmp_path / "same").write_text('A sign that says "ONE".\nA wall that says "ONE".\n')
    (tmp_path / "digits").write_text('A sign that says "12".\nA wall that says "34".\n')
    (tmp_path / "prompts").write_text('A sign that says "ONE".\nA wall that says "TWO".\n')
    (tmp_path / "twowords").write_text("two words\n")
    (tmp_path / "words").write_text("stupid\n")
    (tmp_path / "model.safetensors").write_bytes(b"x" * 99)
    Image.new("RGB", (128, 64)).save(tmp_path / "picture.png")
    Image.new("RGB", (64, 128)).save(tmp_path / "upright.png")
    for name, text in (("list", "[]"), ("number", "3"), ("object", "{}"), ("text", "hello"), ("cells", '{"cells": 1}')):
        (tmp_path / f"{name}.ipynb").write_text(text)
    (tmp_path / "deep.ipynb").write_text("[" * 100_000)
    (tmp_path / "cut.ipynb").write_text('{"cells": [')
    cell = {"cell_type": "code", "metadata": {}, "source": "", "outputs": [{"name": "x"}], "execution_count": None}
    odd = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (tmp_path / "odd.ipynb").write_text(json.dumps(odd))
    (tmp_path / "fine.ipynb").write_text(json.dumps(odd | {"cells": []}))
    (tmp_path / "folder").mkdir()
    for folder, log in (("run", '{"report": {"name": "sd3-mini"}}'), ("other", '{"report": {"name": "if-mini"}}')):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "training.json").write_text(log)
    for folder, log in (("cut", '{"report"'), ("bare", "{}"), ("many", "[" * 100_000)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "training.json").write_text(log)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "pytorch_lora_weights.safetensors").write_bytes(b"x")
    outs = [tmp_path / n for n in ("file", "file/below", "nowhere", "nowhere/below", "loop", "n" * 300, "m" * 256)]
    outs += ["", " ", f"{tmp_path}/{SURROGATE}", f"{tmp_path}/zero\0", str(tmp_path) + "/deep" * 1000]
    return [str(out) for out in outs]


def grammar(at, outs):
    """For each command its right arguments, and for each of them (or for an option that is added) wrong values.

    A command is (words, arguments); an argument (option or "", right values, wrong values).
    """
    out = ("--out", [f"{at}/out"], outs)
    images = [f"{at}/{n}" for n in ("none.png", "file", "upright.png", "folder", "empty")] + ["", f"{at}/x\0"]
    files = [f"{at}/{n}" for n in ("none", "folder", "empty", "binary", "file/below")] + ["", SURROGATE, "p" * 300]
    paths = [f"{at}/none", "./none", "none/of/these", f"{at}/file", f"{at}/model.safetensors", "", "x" * 300, SURROGATE]
    seed, pairs = ("--seed", [], [*WHOLE, str(2**63), str(2**64)]), ("--pairs", [], [*WHOLE, "0", "100000000000"])
    layers, device = ("--layers", [], [*WHOLE, "all", "12345"]), ("--device", ["cpu"], DEVICES)
    size = [("--height", [], [*WHOLE, "0", "65", "8192", "128"]), ("--width", [], [*WHOLE, "0", "72", "99999"])]
    drawing = [
        ("--steps", [], [*WHOLE, "0", "1001", "1000000000"]),
        ("--guidance", [], REAL),
        ("--noises", [], [*WHOLE, "0", "101"]),
        *size,
    ]
    model = [("", ["sd3-mini"], MODELS), device, seed, ("--model-path", [], paths), ("--variant", [], ["", " "])]
    preset, named = (
        ("--preset", [], TYPED),
        ("--layers", ["0"], ["-1", "1.5", "some", "", ("all", "1"), "nan", ("localized", "2")]),
    )
    runs = [f"{at}/{n}" for n in ("none", "file", "folder", "other", "cut", "bare", "many")]
    runs += ["", "x" * 300, SURROGATE]
    notebook = [f"{at}/{n}.ipynb" for n in ("list", "number", "object", "text", "cells", "deep", "cut", "none")]
    return {
        "generate": [*model, ("", [HELLO], PROMPTS), out, *drawing],
        "guard": [
            *model,
            ("--prompt", [HELLO], [SURROGATE, "\0"]),
            ("--words", [], [*files, f"{at}/twowords"]),
            out,
            drawing[0],
            layers,
        ],
        "guard --file": [*model, ("--file", [f"{at}/prompts"], files), out],
        "localize": [
            *model,
            *drawing,
            pairs,
            preset,
            ("--search", [], TYPED),
            ("--by", [], TYPED),
            ("--prompts", [], [*files, *(f"{at}/{n}" for n in ("unquoted", "same", "digits"))]),
            ("--reach", [], [*REAL, "0", "1.1"]),
            ("--budget", [], [*REAL, "0", "2"]),
        ],
        "edit": [
            *model,
            *drawing,
            ("--prompt", [HELLO], PROMPTS),
            ("--to", ["WORLD"], NEW),
            out,
            ("--image", [], images),
            ("--start", [], [*WHOLE, "999", "1000"]),
            layers,
        ],
        "lora train": [
            *model,
            out,
            named,
            ("--data", [], [*files, f"{at}/adapter"]),
            ("--rank", [], [*WHOLE, "0", "1000000000"]),
            ("--steps", [], [*WHOLE, "0"]),
            ("--batch", [], [*WHOLE, "0", "100000000"]),
            ("--lr", [], [*REAL, "0", "2"]),
        ],
        "lora eval": [
            *model,
            ("--adapter", [f"{at}/adapter"], files),
            ("--words", [], [*WHOLE, "0", "3", "601", "99999"]),
        ],
        "study contents": [*model, ("--tables", [], TYPED), preset, layers],
        "study layers": [*model, preset],
        "study trainings": [("", ["sd3-mini"], MODELS), ("", [f"{at}/run"], runs), preset, seed],
        "study edit": [*model, ("--tables", [], TYPED), preset, pairs, layers, drawing[2]],
        "study toxic": [*model, preset, layers, drawing[2]],
        "study looks": [*model, preset, layers],
        "explore": [("", ["sd3-mini"], MODELS), device, seed, pairs],
        "train": [
            ("", ["sd3-mini"], MODELS),
            out,
            ("--ship", [f"{at}/ship"], [*outs, *([str(at)] if at else [])]),
            ("--seed", [], [*WHOLE, str(2**31)]),
            ("--samples", [], [*WHOLE, "0"]),
            ("--pool", [], [*WHOLE, "0", "1"]),
            ("--batch", [], [*WHOLE, "0"]),
            ("--lr", [], [*REAL, "0", "2"]),
            ("--evaluations", [], WHOLE),
            ("--pairs", [], [*WHOLE, "0", "10001"]),
            ("--autoencoder-steps", [], [*WHOLE, "0"]),
            ("--encoder-steps", [], [*WHOLE, "0"]),
            ("--parts", [], outs),
            ("--world", [], TYPED),
            ("--layers", [], [*WHOLE, "0", "101"]),
            ("--seeing", [], [*WHOLE, ("3", "x"), "10000"]),
            ("--text", [], TYPED),
            ("--precision", [], TYPED),
            device,
        ],
        "run": [
            ("", [f"{at}/fine.ipynb"], [*notebook, "", SURROGATE]),
            out,
            ("--jobs", [], [*WHOLE, "0"]),
            ("--timeout", [], [*WHOLE, "0"]),
            ("--models", [], MODELS),
            preset,
            ("--seed", [], WHOLE),
        ],
        "strip": [("", [f"{at}/fine.ipynb"], [*notebook, f"{at}/odd.ipynb", f"{at}/folder", "", SURROGATE])],
    }


def line(command, arguments, wrong=None, value=None):
    """A command line with its right arguments, and another value for argument number ``wrong``."""
    words = command.removesuffix(" --file").split()
    for i, (option, right, _) in enumerate(arguments):
        given = value if i == wrong and isinstance(value, tuple) else (value,) if i == wrong else right
        if option and given and given[0].startswith("-"):  # otherwise it would be taken for an option
            words.append(f"{option}={given[0]}")
        elif given:
            words += [option, *given] if option else given
    return words


class Reached(TextlocError):
    """The command got as far as the model."""


REACHED = []


@pytest.fixture
def at(tmp_path, monkeypatch):
    """An own folder; what comes after the checks only says that it was reached."""

    def reached(*args, **kwargs):
        REACHED.append(True)
        raise Reached("reached")

    for place in ("models.load", "trainings.load", "miniatures.training.train", "book.notebooks.execute"):
        monkeypatch.setattr(f"textloc_utils.{place}", reached)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tree(folder):
    """Everything below a folder: names, sizes, times."""
    return sorted((str(p), p.lstat().st_size, p.lstat().st_mtime_ns) for p in folder.rglob("*"))


def answer(words, capsys) -> str:
    """The one line that a wrong command line is answered with. Whatever else it raises or prints is a failed test."""
    REACHED.clear()
    status = cli.main(words)
    out, err = capsys.readouterr()
    assert status == 2 and not out, (words, status, out)
    assert err.count("\n") == 1 and err.startswith("textloc: ") and len(err) < 1000, (words, err)
    return err


NAMES = list(grammar("", []))


@pytest.mark.parametrize("command", NAMES)
def test_wrong_values(command, at, capsys):
    arguments = grammar(at, places(at))[command]
    before = tree(at)
    for i, (_, _, wrong) in enumerate(arguments):
        for value in wrong:
            words = line(command, arguments, i, value)
            answer(words, capsys)
            assert not REACHED, words
    assert tree(at) == before


@pytest.mark.parametrize("command", NAMES)
def test_unknown_options_and_missing_arguments(command, at, capsys):
    words, before = line(command, grammar(at, places(at))[command]), tree(at)
    n = len(command.removesuffix(" --file").split())
    wrong = [[*words, "--what"], [*words, "--what", "1"], [*words, "--seed"], ["--what", *words], [*words, "-x"]]
    wrong += [[words[0][:-1], *words[1:]], [words[0].upper(), *words[1:]], [*words, "\0"], [*words, SURROGATE], []]
    if "--out" in words and command not in ("run", "train"):
        wrong += [words[:k] for k in range(n, words.index("--out") + 1)]
    for each in wrong:
        answer(each, capsys)
        assert not REACHED, each
    assert tree(at) == before


@pytest.mark.parametrize("command", [name for name in NAMES if name != "strip"])
def test_right_lines_get_as_far_as_the_model(command, at, capsys):
    arguments = grammar(at, places(at))[command]
    before = tree(at)
    assert "reached" in answer(line(command, arguments), capsys) and REACHED
    assert tree(at) == before


def test_there_are_hundreds_of_wrong_lines(tmp_path):
    assert sum(len(wrong) for arguments in grammar("", []).values() for _, _, wrong in arguments) >= 800


def test_a_full_disk_and_one_without_permission(at, capsys, monkeypatch):
    words = ["generate", "sd3-mini", HELLO, "--out", str(at / "out")]
    monkeypatch.setattr("textloc_utils.settings.SPARE", 2**80)
    assert "is full" in answer(words, capsys)
    monkeypatch.setattr("textloc_utils.settings.SPARE", 0)
    monkeypatch.setattr(os, "access", lambda *args: False)
    assert "no permission" in answer(words, capsys)
    assert not (at / "out").exists()


def test_what_the_system_refuses_later_is_one_line_too(at, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", str(at / "out"))

    monkeypatch.setattr(models, "load", full)
    said = answer(["generate", "sd3-mini", HELLO, "--out", str(at / "out")], capsys)
    assert "No space left on device" in said and str(at / "out") in said


def test_a_single_file_checkpoint_is_told_how_to_convert_it(at, capsys):
    (at / "sdxl.safetensors").write_bytes(b"x" * 99)
    words = ["generate", "sdxl", HELLO, "--model-path", "sdxl.safetensors", "--out", str(at / "out")]
    said = answer(words, capsys)
    assert "StableDiffusionXLPipeline" in said and "from_single_file('sdxl.safetensors')" in said


def test_a_mistyped_folder_is_told_from_a_repository(at, capsys):
    (at / "models").mkdir()
    words = ["generate", "sdxl", HELLO, "--out", str(at / "out"), "--model-path"]
    for wrong in ("./sdxl", "models/sdxl", "../models/sdxl", "a/b/c", "/models/sdxl", "~/sdxl"):
        assert "folder" in answer([*words, wrong], capsys) and not REACHED, wrong
    assert answer([*words, "owner/sdxl"], capsys) and REACHED


def test_a_negative_prompt_that_nothing_reads_is_refused(at, capsys):
    words = ["generate", "sd3-mini", HELLO, "--out", str(at / "out"), "--negative-prompt", "A wall", "--guidance"]
    assert "guidance above 1" in answer([*words, "1"], capsys) and not REACHED
    assert answer([*words, "2"], capsys) and REACHED


def test_names_without_the_import_are_those_of_the_package():
    assert tuple(prompts.SETS) == options.SETS
