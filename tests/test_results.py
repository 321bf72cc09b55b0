"""The store: resumes after a kill, never half-writes, gives back what was put in."""

import dataclasses
import hashlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from textloc_utils import results, settings
from textloc_utils.results import Store, unit_hash
from textloc_utils.settings import TextlocError


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "results")


def files(store):
    return sorted(p for p in store.root.rglob("*") if p.is_file())


def stored(store, kind):
    """All rows of all stored units of a kind, as the files hold them."""
    paths = sorted((store.root / "units" / kind).glob("*.jsonl"))
    return pd.DataFrame([json.loads(line) for path in paths for line in path.read_text().splitlines()[1:-1]])


def never():
    raise AssertionError("computed although stored")


# --- hashing ---


def test_hash_is_independent_of_order_and_of_containers():
    a = unit_hash("sweep", {"model": "sd3-mini", "layers": (1, 2), "options": {"x": 1, "y": 2}})
    b = unit_hash("sweep", {"options": {"y": 2, "x": np.int64(1)}, "layers": [1, 2], "model": "sd3-mini"})
    assert a == b and len(a) == 64


def test_hash_is_the_same_in_another_process():
    code = "from textloc_utils.results import unit_hash; print(unit_hash('k', {'b': [3, 1, 2], 'a': 'é'}))"
    env = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": str(settings.ROOT)}
    other = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == unit_hash("k", {"a": "é", "b": [3, 1, 2]})


@pytest.mark.parametrize("other", [{"seed": 2}, {"seed": 1, "x": None}, {"seed": "1"}, {}])
def test_hash_changes_with_every_input(other):
    assert unit_hash("sweep", {"seed": 1}) != unit_hash("sweep", other)
    assert unit_hash("sweep", {"seed": 1}) != unit_hash("search", {"seed": 1})


def test_inputs_may_be_dataclasses_and_paths_but_not_objects():
    @dataclasses.dataclass
    class Settings:
        steps: int = 4

    assert unit_hash("k", {"s": Settings(), "p": Path("a/b")}) == unit_hash("k", {"s": {"steps": 4}, "p": "a/b"})
    with pytest.raises(TextlocError, match="object"):
        unit_hash("k", {"s": object()})


# --- units ---


def test_a_unit_is_computed_once_and_comes_back_the_same(store):
    rows = [
        {"layer": 1, "score": 0.1 + 0.2, "read": "", "ok": True, "layers": [1, 2], "psnr": math.inf},
        {"layer": 2, "score": math.nan, "read": "NULL", "ok": False, "layers": [], "psnr": 3.0},
    ]
    first = store.unit("sweep", {"seed": 1}, lambda: rows, model=None)
    again = store.unit("sweep", {"seed": 1}, never, model=None)
    pd.testing.assert_frame_equal(first, again, check_exact=True)
    assert again.layer.tolist() == [1, 2] and again.layer.dtype == np.int64
    assert again.score[0] == 0.1 + 0.2 and math.isnan(again.score[1])
    assert again["read"].tolist() == ["", "NULL"]
    assert again.ok.dtype == bool and again.layers[0] == [1, 2] and again.psnr[0] == math.inf


def test_a_dataframe_with_numpy_values_and_another_index(store):
    table = pd.DataFrame({"a": np.array([1, 2], np.int32), "b": np.array([0.5, 1.5], np.float32)}, index=[7, 9])
    out = store.unit("k", {}, lambda: table, model=None)
    assert out.to_dict("list") == {"a": [1, 2], "b": [0.5, 1.5]} and out.index.tolist() == [0, 1]


def test_an_empty_table_keeps_its_columns_and_counts_as_done(store):
    store.unit("k", {}, lambda: pd.DataFrame(columns=["a", "b"]), model=None)
    assert list(store.unit("k", {}, never, model=None).columns) == ["a", "b"]


def test_provenance_stands_in_the_header_and_not_in_the_hash(store, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/textloc", "study", "m"])
    store.unit("k", {"a": 1}, lambda: [{"x": 1}], model=None)
    versions = dict(results.provenance()["versions"])
    monkeypatch.setattr(results, "_versions", lambda: versions)
    monkeypatch.setattr(results, "_commit", lambda: "another")
    monkeypatch.setattr(results, "_command", lambda: "another")
    store.unit("k", {"a": 1}, never, model=None)
    (path,) = files(store)
    header = json.loads(path.read_text().split("\n")[0])
    assert header["inputs"] == {"a": 1} and header["kind"] == "k" and path.stem == unit_hash("k", {"a": 1})
    about = header["provenance"]
    assert about["versions"]["textloc_utils"] and about["versions"]["torch"] and about["device"]
    assert about["created"].endswith("+00:00") and about["seconds"] >= 0
    assert about["reader"].startswith("tesseract 5") and about["command"] == "textloc study m"
    # Another build of the same version is the same; after an upgrade it is computed anew, in place of the old one.
    versions["torch"] = versions["torch"].partition("+")[0] + "+cu999"
    store.unit("k", {"a": 1}, never, model=None)
    versions["diffusers"] = "999.0"
    assert store.unit("k", {"a": 1}, lambda: [{"x": 2}], model=None).x.tolist() == [2]
    assert store.unit("k", {"a": 1}, never, model=None).x.tolist() == [2]
    del versions["torch"]  # nor is it hidden that one is missing
    assert store.unit("k", {"a": 1}, lambda: [{"x": 3}], model=None).x.tolist() == [3]
    assert files(store) == [path]


def test_the_key_holds_device_type_of_number_and_reader(store, monkeypatch):
    """Units of other devices, types and readers stand beside each other; the same model's comes back."""

    def model(device, dtype, height=64):
        return SimpleNamespace(
            device=torch.device(device), denoiser=SimpleNamespace(dtype=dtype), spec=SimpleNamespace(height=height)
        )

    monkeypatch.setattr(results, "_reader", lambda height: f"reader of {height}, version {version}")
    version = 1
    kinds = [("cpu", torch.float32), ("cuda:0", torch.float32), ("cpu", torch.bfloat16), ("cuda", torch.float16)]
    kinds += [("cpu", torch.float32, 1024)]
    for i, kind in enumerate(kinds):
        store.unit("k", {"a": 1}, lambda i=i: [{"x": i}], model=model(*kind))
    assert len(files(store)) == len(kinds)
    for i, kind in enumerate(kinds):
        assert store.unit("k", {"a": 1}, never, model=model(*kind)).x.tolist() == [i]
    assert store.unit("k", {"a": 1}, never, model=model("cuda:1", torch.float32)).x.tolist() == [1]
    headers = [json.loads(path.read_text().split("\n")[0]) for path in files(store)]
    assert all(h["provenance"]["reader"] == h["inputs"]["reader"] for h in headers)
    version = 2
    assert store.unit("k", {"a": 1}, lambda: [{"x": 9}], model=model(*kinds[0])).x.tolist() == [9]


def test_provenance_names_the_models_own_device(monkeypatch):
    """Where an accelerator is there and not used, the processor computed it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an accelerator")
    assert results.provenance()["device"] == "an accelerator"
    for kind, told in (("cpu", "CPU ("), ("cuda", "an accelerator")):
        model = SimpleNamespace(device=torch.device(kind), spec=SimpleNamespace(height=64))
        assert results.provenance(model)["device"].startswith(told)


def test_the_reader_is_the_one_of_the_height(monkeypatch):
    monkeypatch.setattr(results.ocr, "engine_of", lambda height: f"engine{height}")
    monkeypatch.setattr(results.ocr, "reader", lambda engine: f"{engine} 1.0")
    assert results._reader.__wrapped__(5) == "engine5 1.0"

    def gone(engine):
        raise TextlocError("not installed")

    monkeypatch.setattr(results.ocr, "reader", gone)
    assert results._reader.__wrapped__(5) is None


def test_the_commit_is_the_clones_own(tmp_path, monkeypatch):
    """None outside a clone, even inside another project's; with a mark where files of the package were changed."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(tmp_path)]
    monkeypatch.setattr(settings, "ROOT", tmp_path / "site-packages")
    (tmp_path / "site-packages").mkdir()
    subprocess.run([*git, "init", "-q"], check=True)
    file = tmp_path / "textloc_utils/a.py"
    file.parent.mkdir()
    file.write_text("1")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    read = results._commit.__wrapped__
    assert read() is None
    monkeypatch.setattr(settings, "ROOT", tmp_path)
    assert read() == head
    (tmp_path / "notes").write_text("of no account")
    assert read() == head
    file.write_text("2")
    assert read() == f"{head}+changes"
    monkeypatch.setenv("PATH", "/nowhere")
    assert read() is None


def test_the_command_names_no_path_of_this_machine(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/home/me/.venv/bin/textloc", "study", "--out", "/home/me/a b", "~/x", "--n=3"])
    assert results._command() == "textloc study --out 'a b' x --n=3"
    monkeypatch.setattr(sys, "argv", ["/x/ipykernel_launcher.py", "-f", "/x/kernel.json"])
    assert results._command() == "a notebook"
    monkeypatch.setenv(results.COMMAND, "textloc run 01.ipynb")
    assert results._command() == "textloc run 01.ipynb"


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text[:-3],
        lambda text: "",
        lambda text: text.replace('"x": 1', '"x": 7'),
        lambda text: "[]\n",
    ],
    ids=["half", "end", "empty", "changed", "other json"],
)
def test_a_damaged_unit_is_recomputed_with_one_warning(store, damage):
    store.unit("k", {}, lambda: [{"x": 1}, {"x": 2}], model=None)
    (path,) = files(store)
    path.write_text(damage(path.read_text()))
    with pytest.warns(UserWarning, match="damaged") as caught:
        table = store.unit("k", {}, lambda: [{"x": 1}, {"x": 2}], model=None)
    assert len(caught) == 1 and table.x.tolist() == [1, 2]
    assert store.unit("k", {}, never, model=None).x.tolist() == [1, 2]


def sealed(header, *rows):
    """A unit's file with a digest that fits, whatever it says."""
    body = "".join(line + "\n" for line in (header, *rows)).encode()
    return body + results._seal(body)


GOOD = {"kind": "k", "inputs": {}, "provenance": {"versions": {}}, "columns": ["x"], "rows": 1}


@pytest.mark.parametrize(
    "change",
    [
        {"provenance": None},
        {"provenance": {"versions": None}},
        {"provenance": {"versions": []}},
        {"provenance": {}},
        {"columns": None},
        {"columns": ["x", "y", "z"], "rows": 2},
        {"rows": 2},
        {"kind": "other"},
        {"inputs": {"seed": 2}},
        {"inputs": None},
        {"kind": ["k"]},
    ],
    ids=str,
)
def test_a_header_that_no_run_wrote_is_recomputed(store, change):
    """Though its digest fits: someone wrote it by hand, or an older version of the package did."""
    path = store.root / "units/k" / f"{unit_hash('k', {})}.jsonl"
    path.parent.mkdir(parents=True)
    for header in (json.dumps(GOOD | change), json.dumps([GOOD]), "[" * 5000 + "]" * 5000, "3", ""):
        path.write_bytes(sealed(header, '{"x": 1}'))
        with pytest.warns(UserWarning, match="damaged"):
            assert store.unit("k", {}, lambda: [{"x": 7}], model=None).x.tolist() == [7]
        assert store.unit("k", {}, never, model=None).x.tolist() == [7]


def test_a_unit_copied_over_another_is_recomputed(store):
    for seed in (1, 2):
        store.unit("k", {"seed": seed}, lambda seed=seed: [{"x": seed}], model=None)
    store.unit("other", {"seed": 1}, lambda: [{"x": 3}], model=None)
    place = store.root / "units/k" / f"{unit_hash('k', {'seed': 1})}.jsonl"
    for source in (unit_hash("k", {"seed": 2}), unit_hash("other", {"seed": 1})):
        (found,) = (store.root / "units").rglob(f"{source}.jsonl")
        place.write_bytes(found.read_bytes())
        with pytest.warns(UserWarning, match="another unit"):
            assert store.unit("k", {"seed": 1}, lambda: [{"x": 1}], model=None).x.tolist() == [1]


def test_what_is_no_file_at_a_units_place_is_told_before_anything_is_computed(store):
    path = store.root / "units/k" / f"{unit_hash('k', {})}.jsonl"
    path.parent.mkdir(parents=True)
    for make, remove in (
        (path.mkdir, path.rmdir),
        (lambda: os.mkfifo(path), path.unlink),
        (lambda: path.symlink_to("nowhere"), path.unlink),
        (lambda: path.symlink_to(path.name), path.unlink),
    ):
        make()
        with pytest.raises(TextlocError, match="not a file") as error:
            store.unit("k", {}, never, model=None)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
        remove()


def flips(path, n, seed):
    """The file with one bit flipped, ``n`` times, and in the end as it was."""
    data, rng = path.read_bytes(), random.Random(seed)
    for bit in rng.choices(range(len(data) * 8), k=n):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        yield bit
    path.write_bytes(data)


#: In each of three files; the suite's share of the thousands that were tried once.
FLIPS = int(os.environ.get("TEXTLOC_FLIPS", 200))


def test_no_flipped_bit_of_a_stored_unit_changes_a_result_without_a_word(store, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    rows = [{"layer": i, "score": i / 7, "read": "É" * i, "ok": i > 1, "layers": [i]} for i in range(5)]
    wanted = store.unit("sweep", {"seed": 1, "model": "m"}, lambda: rows, model=None)
    (path,) = files(store)
    told = 0
    for bit in flips(path, FLIPS, 0):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = store.unit("sweep", {"model": "m", "seed": 1}, lambda: rows, model=None)
        pd.testing.assert_frame_equal(found, wanted, check_exact=True)
        told += len(caught) == 1 and "damaged" in str(caught[0].message)
        assert told, bit
    assert told == FLIPS  # the digest covers every byte, so every flip is told


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_no_flipped_bit_of_a_published_table_changes_a_result_without_a_word(store, suffix):
    table = pd.DataFrame(
        {"model": ["m", 'a "b"', "é"], "layer": [1, 2, 3], "ok": [True, False, True], "s": [0.5, 1, 2]}
    )
    store.publish("sweep", table, {"key": {"weights": "af01", "steps": 20}, "found": {"layers": [1, 2]}})
    wanted = store.load_published("sweep")
    refused = 0
    for bit in flips(store.root / f"sweep{suffix}", FLIPS, 1):
        try:
            found = store.load_published("sweep")
        except TextlocError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert found.equals(wanted) and found.attrs == wanted.attrs, bit
    assert refused > 0.9 * FLIPS  # all but blanks of the JSON
    pd.testing.assert_frame_equal(store.load_published("sweep"), wanted, check_exact=True)


def test_a_computation_that_fails_stores_nothing(store):
    with pytest.raises(ZeroDivisionError):
        store.unit("k", {}, lambda: [{"x": 1 / 0}], model=None)
    assert files(store) == []


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_write_that_fails_leaves_neither_a_unit_nor_scraps(store, monkeypatch, failing):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(TextlocError, match="No space left"):
        store.unit("k", {}, lambda: [{"x": 1}], model=None)
    assert files(store) == []


def test_an_unwritable_folder_is_found_before_anything_is_computed(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(TextlocError, match="file is not a folder; set TEXTLOC_RESULTS to") as error:
        Store(tmp_path / "file").unit("k", {}, never, model=None)
    assert "\n" not in str(error.value)
    monkeypatch.setattr(os, "access", lambda *a: False)
    with pytest.raises(TextlocError, match="no permission in .*; set TEXTLOC_RESULTS to"):
        Store(tmp_path / "locked").unit("k", {}, never, model=None)
    with pytest.raises(TextlocError, match="no permission in .*; set TEXTLOC_RESULTS to"):
        Store(tmp_path / "locked").publish("t", pd.DataFrame({"a": [1]}), {})
    assert not list((tmp_path / "locked").rglob("*.*"))


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b"])
def test_names_cannot_leave_the_store(store, name):
    for call in (
        lambda: store.unit(name, {}, never, model=None),
        lambda: store.publish(name, pd.DataFrame({"a": [1]}), {}),
        lambda: store.load_published(name),
    ):
        with pytest.raises(TextlocError, match="name"):
            call()


def test_root_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("TEXTLOC_RESULTS", str(tmp_path / "elsewhere"))
    assert Store().root == tmp_path / "elsewhere"


# --- kills and crowds ---

RUN = """
import sys, time
from textloc_utils.results import Store
root, log = sys.argv[1:]
store = Store(root)
def compute(i):
    with open(log, "a") as file:
        file.write(f"{i}\\n")
    time.sleep(0.1)
    return [{"unit": i, "row": r, "text": "x" * 40} for r in range(8_000)]
for i in range(5):
    store.unit("run", {"i": i}, lambda: compute(i), model=None)
"""


@pytest.mark.full
def test_a_killed_run_resumes_and_computes_each_finished_unit_once(tmp_path):
    store, log = Store(tmp_path / "results"), tmp_path / "log"
    command = [sys.executable, "-c", RUN, str(store.root), str(log)]
    env = {**os.environ, "PYTHONPATH": str(settings.ROOT)}
    units = store.root / "units" / "run"
    for goal in (2, 4):  # killed twice, in the middle of some unit
        process = subprocess.Popen(command, env=env)
        deadline = time.monotonic() + 60
        while not (log.exists() and log.read_text().count("\n") > goal and len(list(units.glob("*.jsonl"))) >= goal):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        finished = len(list(units.glob("*.jsonl")))
        assert goal <= finished < 5
        assert len(stored(store, "run")) == 8_000 * finished  # whole units only
    subprocess.run(command, env=env, check=True)
    table = stored(store, "run")
    assert table.groupby("unit").size().to_dict() == dict.fromkeys(range(5), 8_000)
    computed = Counter(map(int, log.read_text().split()))
    assert sorted(computed) == list(range(5))
    assert computed.total() <= 5 + 2  # each kill costs at most the unit it hit
    assert computed[0] == computed[1] == 1


def _fill(root, worker):
    store = Store(root)
    for i in range(8):
        store.unit("crowd", {"worker": worker, "i": i}, lambda i=i: [{"worker": worker, "i": i}], model=None)
        store.unit("crowd", {"shared": i}, lambda i=i: [{"worker": -1, "i": i}], model=None)


def test_processes_share_a_store(tmp_path):
    store = Store(tmp_path)
    with ProcessPoolExecutor(3) as pool:
        list(pool.map(_fill, [tmp_path] * 3, range(3)))
    table = stored(store, "crowd")
    assert sorted(zip(table.worker, table.i, strict=True)) == [(w, i) for w in (-1, 0, 1, 2) for i in range(8)]
    assert not list(store.root.rglob(".part-*"))


# --- published tables ---


def test_published_tables_come_back_exactly(store):
    table = pd.DataFrame(
        {
            "model": ["sd3-mini", 'ldm, "mini"', "é"],
            "read": ["", "NULL", "NAN"],
            "layer": [1, 2, 3],
            "score": [0.1 + 0.2, math.nan, math.inf],
            "ok": [True, False, True],
        },
        index=[5, 6, 7],
    )
    path = store.publish("sweep", table, {"preset": "book", "seed": np.int64(42)})
    assert path == store.root / "sweep.csv"
    assert [p.name for p in files(store)] == ["sweep.csv", "sweep.json"]
    out = store.load_published("sweep")
    pd.testing.assert_frame_equal(out, table.reset_index(drop=True), check_exact=True)
    about = out.attrs["provenance"]
    assert about["preset"] == "book" and about["seed"] == 42 and "textloc_utils" in about["versions"]
    assert json.loads((store.root / "sweep.json").read_text())["rows"] == 3


def test_published_tables_hold_no_lists(store):
    with pytest.raises(TextlocError, match="layers"):
        store.publish("t", pd.DataFrame({"layers": [[1, 2]]}), {})
    assert not store.root.exists() or files(store) == []


def test_a_published_table_copied_over_another_is_refused(store):
    for name in ("a", "b"):
        store.publish(name, pd.DataFrame({"x": [name]}), {"key": {"name": name}})
    for suffix in (".csv", ".json"):
        (store.root / f"a{suffix}").write_bytes((store.root / f"b{suffix}").read_bytes())
        with pytest.raises(TextlocError, match=r"a\.(csv|json)"):
            store.load_published("a")
        with pytest.raises(TextlocError, match="publish a again"):
            store.load_matching("a", {"name": "a"})
    assert store.load_matching("c", {"name": "c"}) is None
    assert store.load_matching("b", {"name": "c"}) is None and len(store.load_matching("b", {"name": "b"})) == 1


def test_what_the_caller_says_of_where_a_table_came_from_wins(store):
    store.publish("t", pd.DataFrame({"a": [1]}), {"device": "a laptop", "seconds": 3})
    about = store.load_published("t").attrs["provenance"]
    assert (about["device"], about["seconds"]) == ("a laptop", 3) and about["commit"] and about["reader"]
    store.publish("t", pd.DataFrame({"a": [1]}), {})
    assert store.load_published("t").attrs["provenance"]["seconds"] > 0


def test_the_published_tables_of_the_project_are_whole():
    for root in (settings.ROOT / "data/results", settings.ROOT / "data/results/explorer"):
        names = [path.stem for path in root.glob("*.csv")]
        assert names
        for name in names:
            assert len(Store(root).load_published(name)), name


def test_missing_and_damaged_published_tables(store):
    store.publish("good", pd.DataFrame({"a": [1, 2]}), {})
    with pytest.raises(TextlocError, match="known: good"):
        store.load_published("bad")
    csv = store.root / "good.csv"
    text = csv.read_text()
    csv.write_text(text.replace("2", "3"))
    with pytest.raises(TextlocError, match="digest"):
        store.load_published("good")
    csv.write_text(text)
    csv.with_suffix(".json").write_text("{")
    with pytest.raises(TextlocError, match="damaged"):
        store.load_published("good")


def test_published_files_have_ordinary_permissions(store):
    path = store.publish("t", pd.DataFrame({"a": [1]}), {})
    reference = store.root / "reference"
    reference.touch()
    assert path.stat().st_mode == reference.stat().st_mode


# --- scalars ---


def test_record_glues_and_returns(monkeypatch):
    import myst_nb

    glued = []
    monkeypatch.setattr(myst_nb, "glue", lambda name, value, display=True: glued.append((name, value, display)))
    value = results.record("exact", np.float64(0.5))
    assert value == 0.5 and glued == [("exact", 0.5, False)] and type(glued[0][1]) is float


def test_record_without_myst_nb_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "myst_nb", None)
    with pytest.raises(TextlocError, match="pip install myst-nb"):
        results.record("x", 1)


# --- to the byte ---


@pytest.fixture
def clock(monkeypatch):
    """Every look at the clock finds it 1.23456 seconds further."""
    ticks = iter(range(10_000))
    monkeypatch.setattr(results, "time", SimpleNamespace(monotonic=lambda: 100 + 1.23456 * next(ticks)))
    monkeypatch.setattr(results, "_BEGAN", 50.0)


@pytest.fixture
def known(monkeypatch):
    """Results are made at a known place."""
    monkeypatch.setattr(results, "_versions", lambda: {"textloc_utils": "1", "torch": "2"})
    monkeypatch.setattr(results, "_commit", lambda: "c0ffee")
    monkeypatch.setattr(results, "_reader", lambda height: f"reader of {height}")
    monkeypatch.setattr(sys, "argv", ["/bin/textloc", "study"])


def test_a_units_file_to_the_byte(store, clock, known):
    model = SimpleNamespace(
        device=torch.device("cuda:1"), denoiser=SimpleNamespace(dtype=torch.bfloat16), spec=SimpleNamespace(height=512)
    )
    store.unit("sweep", {"seed": 1}, lambda: pd.DataFrame({"a b": ["é"], 7: [0.5]}, index=[3]), model=model)
    (path,) = files(store)
    *lines, last = path.read_text().splitlines(keepends=True)
    header = json.loads(lines[0])
    created, device = (header["provenance"].pop(name) for name in ("created", "device"))
    assert len(created) == 25 and device
    inputs = {"seed": 1, "device": "cuda", "dtype": "bfloat16", "reader": "reader of 512"}
    assert header == {
        "kind": "sweep",
        "inputs": inputs,
        "provenance": {
            "versions": {"textloc_utils": "1", "torch": "2"},
            "commit": "c0ffee",
            "command": "textloc study",
            "reader": "reader of 512",
            "seconds": 1.235,
        },
        "columns": ["a b", "7"],
        "rows": 1,
    }
    assert lines[1:] == ['{"a b": "é", "7": 0.5}\n']
    assert json.loads(last) == {"sha256": hashlib.sha256("".join(lines).encode()).hexdigest()} and last.endswith("}\n")
    assert path.stem == unit_hash("sweep", inputs)


def test_a_published_tables_files_to_the_byte(store, clock, known, monkeypatch):
    order, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(Path(b).name), replace(a, b)))
    table = pd.DataFrame({"t": ["é", None], "i": [1, 2], "f": [0.1, math.nan], "b": [True, False]}, index=[4, 5])
    path = store.publish("t", table, {"key": {"é": (1, 2)}})
    assert path.read_bytes() == "t,i,f,b\né,1,0.1,True\n,2,,False\n".encode()
    assert order == ["t.csv", "t.json"]  # between the two the digest does not fit
    text = path.with_suffix(".json").read_text()
    about = json.loads(text)
    assert text == json.dumps(about, indent=2, ensure_ascii=False) + "\n"
    created, device = (about["provenance"].pop(name) for name in ("created", "device"))
    assert created and device and len(about.pop("seal")) == 64
    assert about == {
        "table": "t.csv",
        "rows": 2,
        "columns": {"t": "str", "i": "int", "f": "float", "b": "bool"},
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "provenance": {
            "versions": {"textloc_utils": "1", "torch": "2"},
            "commit": "c0ffee",
            "command": "textloc study",
            "reader": "reader of 1",
            "seconds": 50.0,
            "key": {"é": [1, 2]},
        },
    }
    # Git may have changed the line ends of the table.
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert store.load_published("t").t.tolist() == ["é", ""]


def test_an_empty_published_table_keeps_its_types(store):
    table = pd.DataFrame({"t": [], "i": [], "f": [], "b": []}).astype({"t": str, "i": int, "f": float, "b": bool})
    store.publish("t", table, {})
    found = store.load_published("t")
    assert len(found) == 0 and [str(found[c].dtype) for c in "ifb"] == ["int64", "float64", "bool"]


def test_messages_of_the_store(store, monkeypatch):
    """What a caller reads: which table, which others there are, where results could go."""
    assert repr(Store("x")) == "Store('x')"
    with pytest.raises(TextlocError, match="known: none$"):
        store.load_published("a")
    for name in ("b", "A-2_x"):
        store.publish(name, pd.DataFrame({"x": [1]}), {})
    with pytest.raises(TextlocError, match="known: A-2_x, b$"):
        store.load_published("a")
    with pytest.raises(TextlocError, match="column 'x' of the-table must hold"):
        store.publish("the-table", pd.DataFrame({"x": [["list"]]}), {})

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    for write in (
        lambda: store.publish("t", pd.DataFrame({"a": [1]}), {}),
        lambda: store.unit("k", {}, lambda: [{"a": 1}], model=None),
    ):
        with pytest.raises(TextlocError, match="No space left on device.*; set TEXTLOC_RESULTS to a folder"):
            write()


def test_a_folder_that_may_not_be_entered_is_unwritable(tmp_path, monkeypatch):
    """Both rights are asked for; the superuser has all, so that the question itself is looked at."""
    asked = []
    monkeypatch.setattr(os, "access", lambda folder, rights: asked.append(rights) or True)
    Store(tmp_path).unit("k", {}, lambda: [{"x": 1}], model=None)
    assert asked == [os.W_OK | os.X_OK]


def test_a_damaged_unit_is_told_at_the_callers_line(store):
    store.unit("k", {}, lambda: [{"x": 1}], model=None)
    (path,) = files(store)
    path.write_text("no unit")
    with pytest.warns(UserWarning, match="recomputing damaged result .*: it does not match its digest$") as caught:
        store.unit("k", {}, lambda: [{"x": 1}], model=None)
    assert caught[0].filename == __file__
