"""Files and folders appear whole or not at all: failures, kills, crowds."""

import hashlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from textloc_utils import files, settings
from textloc_utils.settings import TextlocError


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_what_is_written_is_there_with_ordinary_permissions_and_nothing_else(tmp_path):
    files.write_bytes(tmp_path / "a/b/x.bin", b"\0\r\n")
    files.write_text(tmp_path / "a/x.txt", "É\r\n")
    assert files.write_json(tmp_path / "x.json", {"É": [1]}) == tmp_path / "x.json"
    with files.whole_folder(tmp_path / "folder") as part:
        (part / "deep").mkdir()
        (part / "deep/file").write_text("1")
    assert everything(tmp_path) == {
        "a/b/x.bin": b"\0\r\n",
        "a/x.txt": "É\r\n".encode(),
        "folder/deep/file": b"1",
        "x.json": '{\n "É": [\n  1\n ]\n}\n'.encode(),
    }
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/file").touch()
    for made, plain in (("folder", "plain"), ("a", "plain"), ("a/x.txt", "plain/file"), ("folder/deep", "plain")):
        assert (tmp_path / made).stat().st_mode == (tmp_path / plain).stat().st_mode


def test_several_files_come_in_their_order(tmp_path, monkeypatch):
    order, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(Path(b).name), replace(a, b)))
    with files.whole_files(tmp_path, "1.json", "0.json") as aside:
        for name in ("0.json", "1.json", "b.png", "a.png"):
            (aside / name).write_text(name)
        assert not everything(tmp_path).keys() & {"0.json", "a.png"}
    assert order == ["a.png", "b.png", "1.json", "0.json"]
    with pytest.raises(TextlocError, match="last.json"), files.whole_files(tmp_path, "last.json") as aside:
        (aside / "b.png").write_text("other")
    assert everything(tmp_path)["b.png"] == b"b.png"  # a promised file is missing, so none is replaced


class OwnError(Exception):
    """Raised inside a block."""


@pytest.mark.parametrize("error", [OwnError(), KeyboardInterrupt(), TextlocError("one line"), OSError("no number")])
def test_an_error_inside_comes_out_and_leaves_everything_as_it_was(tmp_path, error):
    files.write_text(tmp_path / "old/file", "old")
    for block in (
        lambda: files.whole_file(tmp_path / "old/file"),
        lambda: files.whole_folder(tmp_path / "old"),
        lambda: files.whole_file(tmp_path / "new/deeper/file"),
        lambda: files.whole_folder(tmp_path / "new/deeper"),
    ):
        with pytest.raises(type(error)) as raised, block() as part:
            (part / "file" if part.is_dir() else part).write_text("new")
            raise error
        assert raised.value is error
    assert everything(tmp_path) == {"old/file": b"old"} and os.listdir(tmp_path) == ["old"]


def test_an_error_at_another_place_is_not_called_a_failed_write(tmp_path):
    with pytest.raises(FileNotFoundError), files.whole_file(tmp_path / "file") as part:
        part.write_bytes(Path("/no/such/file").read_bytes())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("file/x", "Not a directory|File exists"),
        ("folder", "Is a directory"),
        ("n" * 300, "File name too long"),
        ("loop/x", "Too many levels|File exists"),
        ("dangling/x", "File exists"),
    ],
)
def test_places_that_cannot_be_written_are_told_in_one_line(tmp_path, place, said):
    (tmp_path / "file").touch()
    (tmp_path / "folder/full").mkdir(parents=True)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere/at all")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(TextlocError, match=said) as error:
        files.write_text(tmp_path / place, "x", advice="choose another")
    assert "\n" not in str(error.value) and str(error.value).endswith("; choose another")
    assert sorted(os.listdir(tmp_path)) == before


def limited(code: str, folder: Path, size: int = 4096) -> subprocess.CompletedProcess:
    """Run code in a process whose files may not grow beyond ``size`` bytes, as on a full disk."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True,
        text=True,
        preexec_fn=limit,
        env=os.environ | {"PYTHONPATH": str(settings.ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
    )


FULL = """
import sys
from pathlib import Path
import numpy, torch
from PIL import Image
from safetensors.torch import save_file
from textloc_utils import files
from textloc_utils.settings import TextlocError
folder, x = Path(sys.argv[1]), torch.zeros(100_000)
def picture(path):
    with files.whole_file(path) as part:
        Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (99, 99, 3), dtype="uint8")).save(part)
def tensors(path):
    with files.whole_file(path) as part:
        save_file({"x": x}, part)
def several(path):
    with files.whole_files(path, "b") as aside:
        (aside / "b").write_text("b")
        (aside / "a").write_text("a" * 5000)
def a_folder(path):
    with files.whole_folder(path) as part:
        (part / "a").write_text("a" * 5000)
for write in (lambda p: files.write_text(p, "x" * 5000), lambda p: files.write_state(p, {"x": x}),
              picture, tensors, several, a_folder):
    for place in ("new/x.png", "old.png"):
        try:
            write(folder / place)
        except TextlocError as error:
            print(error)
"""


@pytest.mark.full
def test_a_full_disk_is_one_line_and_nothing_half_written(tmp_path):
    (tmp_path / "old.png").mkdir()
    ran = limited(FULL, tmp_path)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert len(lines) == 12 and all("File too large" in line or "Is a directory" in line for line in lines), lines
    assert sum("File too large" in line for line in lines) >= 10
    assert os.listdir(tmp_path) == ["old.png"] and not os.listdir(tmp_path / "old.png")


# --- states ---


def test_a_state_comes_back_and_any_flipped_bit_is_found(tmp_path):
    path = tmp_path / "state.pt"
    state = {"x": torch.arange(6.0), "losses": [0.5, 0.25], "key": {"a": (1, None, "é")}}
    files.write_state(path, state)
    back = files.read_state(path)
    assert torch.equal(back.pop("x"), state.pop("x")) and back == state
    data = path.read_bytes()
    for bit in range(0, len(data) * 8, 97):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(TextlocError, match="damaged"):
            files.read_state(path)
    for other in (b"", data[:-1], data[:40], data + b"\n"):
        path.write_bytes(other)
        with pytest.raises(TextlocError, match="damaged"):
            files.read_state(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(TextlocError, match="damaged"):
        files.read_state(path)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_code_in_a_state_is_not_run(tmp_path, monkeypatch):
    """Whoever can write a file can write its digest."""
    monkeypatch.chdir(tmp_path)
    state = io.BytesIO()
    torch.save({"x": Evil()}, state)
    (tmp_path / "state.pt").write_bytes(state.getvalue() + hashlib.sha256(state.getvalue()).digest())
    with pytest.raises(TextlocError, match="damaged"):
        files.read_state(tmp_path / "state.pt")
    assert os.listdir(tmp_path) == ["state.pt"]


@pytest.mark.parametrize("value", [Evil(), np.float64(0.5), {"lr": [np.float64(0.5)]}], ids=["code", "number", "deep"])
def test_a_state_that_could_not_be_read_back_is_not_written(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match="state.pt: the state holds a value that cannot be read back: "):
        files.write_state(tmp_path / "state.pt", {"x": value})
    assert not os.listdir(tmp_path)


def test_scratch_is_new_and_gone_and_what_was_left_goes_too(tmp_path, monkeypatch):
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path))
    with files.scratch() as one, files.scratch() as two:
        (one / "x").write_text("1")
        assert one != two and not os.listdir(two) and one.is_relative_to(tmp_path)
    assert len(everything(tmp_path)) == 0
    left = one.parent / ".part-left"
    left.mkdir()
    (left / "x").write_text("1")
    with files.scratch():
        assert left.exists()  # its writer may be about to lock it
    monkeypatch.setattr(files, "SETTLED", -1)
    with files.scratch():
        assert not left.exists()
    assert [p.name for p in one.parent.iterdir()] == []


# --- kills and crowds ---

FILL = """
import sys, time
from textloc_utils import files
for i in range(100_000):
    text = str(i) * 20_000
    files.write_text(sys.argv[1] + "/file", text)
    with files.whole_folder(sys.argv[1] + "/folder") as part:
        for name in "ab":
            (part / name).write_text(text)
"""


def test_kills_leave_whole_files_and_the_next_writer_cleans_up(tmp_path, monkeypatch):
    environment = os.environ | {"PYTHONPATH": str(settings.ROOT)}
    files.write_text(tmp_path / "file", "0" * 20_000)
    for wait in (0, 0.01, 0.02, 0.035, 0.05):
        process = subprocess.Popen([sys.executable, "-c", FILL, str(tmp_path)], env=environment)
        began = (tmp_path / "file").stat().st_ino
        while (tmp_path / "file").stat().st_ino == began:
            time.sleep(0.001)
        time.sleep(wait)
        process.kill()
        process.wait()
        for path in [tmp_path / "file", *(tmp_path / "folder").glob("*")]:
            text = path.read_text()
            assert text and text == text[: len(text) // 20_000] * 20_000
    monkeypatch.setattr(files, "SETTLED", -1)
    with files.whole_folder(tmp_path / "folder") as part:
        (part / "a").touch()
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_folder_lost_between_two_renames_comes_back(tmp_path):
    (tmp_path / ".mini.old").mkdir()
    (tmp_path / ".mini.old/file").write_text("old")
    with pytest.raises(OwnError), files.whole_folder(tmp_path / "mini"):
        raise OwnError
    assert everything(tmp_path) == {"mini/file": b"old"}
    with files.whole_folder(tmp_path / "mini") as part:
        (part / "file").write_text("new")
    assert everything(tmp_path) == {"mini/file": b"new"} and os.listdir(tmp_path) == ["mini"]


def test_parts_in_use_and_parts_just_made_are_left_alone(tmp_path, monkeypatch):
    (tmp_path / ".part-new").mkdir()
    with files.whole_file(tmp_path / "slow") as part:
        part.write_text("slow")
        files.write_text(tmp_path / "quick", "quick")
        assert (tmp_path / ".part-new").is_dir()  # its writer may be about to lock it
        monkeypatch.setattr(files, "SETTLED", -1)
        files.write_text(tmp_path / "quick", "quick")
        assert not (tmp_path / ".part-new").exists()
    assert everything(tmp_path) == {"slow": b"slow", "quick": b"quick"}


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with files.whole_folder(tmp_path / "link") as part:
        (part / "x").write_text("x")
    assert (tmp_path / "link").is_symlink() and everything(tmp_path / "real") == {"x": b"x"}


def test_json_is_read_back(tmp_path):
    value = {"a": [1, 2.5, None, True, "é"], "b": {}}
    assert json.loads(files.write_json(tmp_path / "x.json", value).read_text()) == value


def test_one_run_holds_a_folder(tmp_path):
    folder = tmp_path / "a/run"
    with files.only_run(folder):
        for same in (folder, tmp_path / "a/../a/run"):
            with pytest.raises(TextlocError, match="another run writes to") as error, files.only_run(same):
                pytest.fail("two runs")
            assert "\n" not in str(error.value)
        files.write_text(folder / "x", "x")  # the run itself is free to write
    with files.only_run(folder):
        assert os.listdir(folder) == ["x"]
    with pytest.raises(OwnError), files.only_run(tmp_path / "b"):
        raise OwnError
    assert not (tmp_path / "b").exists()
    with pytest.raises(TextlocError, match="cannot write to"), files.only_run(folder / "x"):
        pytest.fail("a file is no folder")


def test_a_killed_run_holds_nothing(tmp_path):
    code = (
        "import sys, time; from textloc_utils import files\nwith files.only_run(sys.argv[1]): print(1); time.sleep(99)"
    )
    environment = os.environ | {"PYTHONPATH": str(settings.ROOT), "PYTHONUNBUFFERED": "1"}
    running = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=environment)
    assert running.stdout is not None
    assert running.stdout.readline() == b"1\n"
    with pytest.raises(TextlocError, match="another run"), files.only_run(tmp_path):
        pytest.fail("two runs")
    running.kill()
    running.communicate()
    with files.only_run(tmp_path):
        pass


def test_a_file_system_without_locks_does_not_stop_a_run(tmp_path, monkeypatch):
    def none(descriptor, what):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", none)
    with files.only_run(tmp_path / "run"):
        files.write_text(tmp_path / "run/x", "x")
    assert everything(tmp_path) == {"run/x": b"x"}
