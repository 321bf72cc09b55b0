"""Hundreds of damaged model folders: one line each, before a weight is read where the files' heads tell; nothing that
lies in a folder is run, and no picture is left. The folder is a tiny Stable Diffusion 3's."""

import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from textloc_utils import cli, models, settings
from textloc_utils.settings import TextlocError

WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
    "text_encoder_3": "model.safetensors",
}
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
TABLES = [
    *("model_index.json", "textloc.json", "scheduler/scheduler_config.json"),
    *(f"{part}/config.json" for part in WEIGHTS),
    *(f"{part}/{name}" for part in TOKENIZERS for name in ("tokenizer.json", "tokenizer_config.json")),
]
FILES = [*TABLES, *(f"{part}/{name}" for part, name in WEIGHTS.items())]
#: Tells that it was run, by a file beside itself.
EVIL = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass Evil:\n    pass\n"
Damage = Callable[[Path], object]


def anew(make: Callable[[Path], object]) -> Damage:
    """Something else in the file's place."""
    return lambda path: (path.unlink(), make(path))


#: What can happen to any file.
TO_FILES: dict[str, Damage] = {
    "gone": Path.unlink,
    "renamed": lambda path: path.rename(path.with_name(f"{path.name}.old")),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "all but the end": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "noise": lambda path: path.write_bytes(random.Random(path.name).randbytes(999)),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "folder": anew(Path.mkdir),
    "pipe": anew(os.mkfifo),
    "dangling link": anew(lambda path: path.symlink_to("gone")),
    "link to itself": anew(lambda path: path.symlink_to(path.name)),
    "device": anew(lambda path: path.symlink_to("/dev/zero")),
}

#: What can stand where a table should.
TO_TABLES: dict[str, Damage] = {
    name: lambda path, text=text: path.write_bytes(text)
    for name, text in {
        "list": b"[]",
        "number": b"3",
        "null": b"null",
        "text": b'"a"',
        "nested": b"[" * 100_000,
        "not UTF-8": b'{"a": "\xff"}',
        "cut in a word": b'{"_class_name": "Stab',
    }.items()
}


def header(change: Callable[[dict], object]) -> Damage:
    """Other words in the head of a weight file, its body as it was."""

    def damage(path: Path) -> None:
        data = path.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        head = json.loads(data[8 : 8 + size])
        change(head)
        text = json.dumps(head).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    return damage


def first(head: dict) -> dict:
    return next(value for name, value in head.items() if name != "__metadata__" and len(value["shape"]) == 2)


def flipped(seed: int) -> Damage:
    """One bit of the head of a weight file."""

    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        (size,) = struct.unpack("<Q", data[:8])
        bit = random.Random(seed).randrange((8 + size) * 8)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)

    return damage


def tensors(change: Callable[[dict], dict]) -> Damage:
    """Other tensors in a weight file, which is whole."""
    return lambda path: save_file(
        {name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path, metadata={"format": "pt"}
    )


#: What the head of a weight file tells.
TO_HEADS: dict[str, Damage] = {
    "huge head": lambda path: path.write_bytes(struct.pack("<Q", 2**60) + path.read_bytes()[8:]),
    "huge shape": header(lambda head: first(head).update(shape=[2**40, 2**40])),
    "negative shape": header(lambda head: first(head).update(shape=[-1, 4])),
    "unknown dtype": header(lambda head: first(head).update(dtype="F33")),
    "dtype of half the size": header(lambda head: first(head).update(dtype="F16")),
    "integers of the same size": header(lambda head: first(head).update(dtype="I32")),
    "whole numbers": tensors(lambda old: {k: v.to(torch.int64) for k, v in old.items()}),
    "truths": tensors(lambda old: {k: v > 0 for k, v in old.items()}),
    "offsets beyond the end": header(lambda head: first(head).update(data_offsets=[0, 2**50])),
    "offsets the wrong way": header(lambda head: first(head).update(data_offsets=[9, 3])),
    "a pickle": lambda path: torch.save({"a": torch.zeros(3)}, path),
    "only a pickle beside": lambda path: torch.save({}, path.rename(path.with_suffix(".bin"))),
    "too few parts": lambda path: path.with_name(f"{path.name}.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"a": "part-00001-of-00002.safetensors"}})
    ),
}

#: What only building the model tells.
TO_WEIGHTS: dict[str, Damage] = {
    "other shape": header(lambda head: first(head).update(shape=[first(head)["shape"][0] * first(head)["shape"][1]])),
    "turned shape": tensors(lambda old: {k: v.T if v.ndim == 2 else v for k, v in old.items()}),
    "names changed": tensors(lambda old: {f"model.{k}": v for k, v in old.items()}),
    "one name changed": tensors(lambda old: {k + "x" * (not i): v for i, (k, v) in enumerate(old.items())}),
    "one tensor only": tensors(lambda old: dict([next(iter(old.items()))])),
    "no tensor": tensors(lambda old: {}),
    "not numbers": tensors(lambda old: {k: torch.full_like(v, torch.nan) for k, v in old.items()}),
    **{f"flipped bit {seed}": flipped(seed) for seed in range(8)},
}


def changed(**values) -> Damage:
    """Other values in a table."""
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | values))


#: What else a model's index can name as its scheduler, its text encoder or its denoiser.
NAMED = (
    *(["evilmod", "Evil"], ["./evilmod", "Evil"], ["evilmod.py", "Evil"], ["scheduler.evilmod", "Evil"]),
    *(["transformers_modules.evilmod", "Evil"], ["os", "system"], ["builtins", "eval"], ["subprocess", "Popen"]),
    *(["diffusers", "evilmod.Evil"], ["diffusers", "__builtins__"], ["diffusers", "utils"], ["diffusers", ""]),
    *(["torch", "load"], ["diffusers.utils", "Evil"], ["", ""], ["../..", "Evil"], ["DIFFUSERS", "DDIMScheduler"]),
    *(["diffusers", "StableDiffusion3Pipeline"], ["diffusers", "OptionalDependencyNotAvailable"]),
)

#: Values of another type, or beyond all sizes, for what a configuration holds.
ODD = ("x", None, [], {}, True, -1, 0, 1.5, 10**7, 10**9, 10**12, 1e300, [10**6] * 3, "1" * 5000)


def odd_value(seed: int) -> Damage:
    """One value of a table becomes another."""

    def damage(path: Path) -> None:
        rng, table = random.Random(seed), json.loads(path.read_text())
        key = rng.choice([k for k in table if not k.startswith("_")])
        table[key] = rng.choice(ODD)
        path.write_text(json.dumps(table))

    return damage


CLASSES = ("Evil", "DiffusionPipeline", "UNet2DModel", "evilmod.Evil", ["evilmod", "Evil"], None, 3, "", "__doc__")
CONFIGURATIONS = [file for file in TABLES if "config.json" in file or file == "textloc.json"]
EARLY = {
    **{f"{file}: {name}": (file, damage) for file in FILES for name, damage in TO_FILES.items()},
    **{f"{file}: {name}": (file, damage) for file in TABLES for name, damage in TO_TABLES.items()},
    **{f"{p}/{file}: {name}": (f"{p}/{file}", d) for p, file in WEIGHTS.items() for name, d in TO_HEADS.items()},
    **{
        f"model_index.json: {part} of {value}": ("model_index.json", changed(**{part: value}))
        for part in ("scheduler", "text_encoder", "transformer")
        for value in NAMED
    },
    **{f"model_index.json: pipeline of {v}": ("model_index.json", changed(_class_name=v)) for v in CLASSES},
}
LATE = {
    **{f"{p}/{file}: {name}": (f"{p}/{file}", d) for p, file in WEIGHTS.items() for name, d in TO_WEIGHTS.items()},
    **{f"odd value {i}": (CONFIGURATIONS[i % len(CONFIGURATIONS)], odd_value(i)) for i in range(150)},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A whole folder, with code in it that nothing may run."""
    folder = tmp_path_factory.mktemp("saved")
    model = tiny.model("sd3")
    model.pipe.save_pretrained(folder)
    known = {"family": models.JOINT, "pipeline": "StableDiffusion3Pipeline", "steps": 1, "guidance": 4.0}
    known |= {"height": 16, "width": 16, "max_sequence_length": 16, "colours": ["red", "blue"]}
    (folder / "textloc.json").write_text(json.dumps(known))
    for place in (folder, folder / "scheduler"):
        (place / "evilmod.py").write_text(EVIL)
    return folder


@pytest.fixture
def damaged(saved, tmp_path, monkeypatch):
    """Makes a damaged copy the working directory, so that Python would find what lies there."""
    (tmp_path / "miniatures").mkdir()
    (tmp_path / "miniatures/sd3-mini").symlink_to(saved)
    monkeypatch.setenv("TEXTLOC_DATA", str(tmp_path))
    monkeypatch.syspath_prepend("")

    def make(file, damage) -> Path:
        folder = tmp_path / "model"
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved, folder)
        damage(folder / file)
        monkeypatch.chdir(folder)
        return folder

    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    yield make
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def untouched(folder: Path) -> bool:
    return not [*folder.rglob("ran"), *folder.rglob("__pycache__")] and "evilmod" not in sys.modules


def test_there_are_hundreds():
    assert len(EARLY) >= 400 and len(LATE) >= 200


@pytest.mark.parametrize("file", FILES)
def test_one_line_before_a_weight_is_read(file, damaged, monkeypatch):
    read = []
    monkeypatch.setattr(models.loading, "_whole", lambda *a: read.append(a) or 1 / 0)
    for name, (at, damage) in EARLY.items():
        if at != file:
            continue
        folder = damaged(at, damage)
        signal.alarm(60)
        with pytest.raises(TextlocError) as raised:
            models.load("sd3-mini", device="cpu", model_path=folder)
        assert not read and "\n" not in str(raised.value) and untouched(folder), name


@pytest.mark.full
def test_one_line_or_a_picture_and_nothing_in_between(damaged, capsys, tmp_path, monkeypatch):
    """A value that nothing reads, or that means the same, may leave the model as it was."""
    monkeypatch.setattr(settings, "SPARE", 0)
    out, drawn = tmp_path / "out", 0
    for name, (at, damage) in LATE.items():
        folder = damaged(at, damage)
        signal.alarm(120)
        words = ["generate", "sd3-mini", 'A sign that says "HELLO".', "--model-path", str(folder), "--out", str(out)]
        status = cli.main(words)
        printed, error = capsys.readouterr()
        assert untouched(folder), name
        if status == 0:
            assert not error and sorted(os.listdir(out))[1:] == ["images.json"], (name, error, os.listdir(out))
            shutil.rmtree(out)
            drawn += 1
            assert "odd value" in name or "flipped" in name or "turned" in name, name
        else:
            assert status == 2 and not printed and error.startswith("textloc: ") and error.count("\n") == 1, (
                name,
                error,
            )
            assert not out.exists(), name
    assert 0 < drawn < len(LATE) / 2


@pytest.mark.full
@pytest.mark.parametrize(
    "name",
    [
        "model_index.json: pipe",
        "model_index.json: scheduler of ['evilmod', 'Evil']",
        "tokenizer_3/tokenizer_config.json: gone",
        "transformer/diffusion_pytorch_model.safetensors: huge shape",
        "vae/diffusion_pytorch_model.safetensors: one name changed",
    ],
)
def test_the_command_itself(name, damaged, tmp_path):
    folder = damaged(*(EARLY | LATE)[name])
    words = ["generate", "sd3-mini", 'A sign that says "HELLO".', "--model-path", ".", "--out", str(tmp_path / "out")]
    ran = subprocess.run(
        [sys.executable, "-m", "textloc_utils.cli", *words],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(settings.ROOT)},
    )
    assert (ran.returncode, ran.stdout) == (2, ""), ran.stderr
    assert ran.stderr.startswith("textloc: ") and ran.stderr.count("\n") == 1
    assert untouched(folder) and not (tmp_path / "out").exists()
