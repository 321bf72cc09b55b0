"""The store: resumes after a kill, never half-writes, gives back what was put in."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from textloc_utils import results, settings
from textloc_utils.results import Store, unit_hash
from textloc_utils.settings import TextlocError


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "results")


def files(store):
    return sorted(p for p in store.root.rglob("*") if p.is_file())


def never():
    raise AssertionError("computed although stored")


# --- hashing ---


def test_hash_is_independent_of_order_and_of_containers():
    a = unit_hash("sweep", {"model": "sd3-mini", "layers": (1, 2), "options": {"x": 1, "y": 2}})
    b = unit_hash("sweep", {"options": {"y": 2, "x": np.int64(1)}, "layers": [1, 2], "model": "sd3-mini"})
    assert a == b and len(a) == 64


def test_hash_is_the_same_in_another_process():
    code = "from textloc_utils.results import unit_hash; print(unit_hash('k', {'b': {3, 1, 2}, 'a': 'é'}))"
    env = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": str(settings.ROOT)}
    other = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == unit_hash("k", {"a": "é", "b": {1, 2, 3}})


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
    first = store.unit("sweep", {"seed": 1}, lambda: rows)
    again = store.unit("sweep", {"seed": 1}, never)
    pd.testing.assert_frame_equal(first, again, check_exact=True)
    assert again.layer.tolist() == [1, 2] and again.layer.dtype == np.int64
    assert again.score[0] == 0.1 + 0.2 and math.isnan(again.score[1])
    assert again["read"].tolist() == ["", "NULL"]
    assert again.ok.dtype == bool and again.layers[0] == [1, 2] and again.psnr[0] == math.inf


def test_a_dataframe_with_numpy_values_and_another_index(store):
    table = pd.DataFrame({"a": np.array([1, 2], np.int32), "b": np.array([0.5, 1.5], np.float32)}, index=[7, 9])
    out = store.unit("k", {}, lambda: table)
    assert out.to_dict("list") == {"a": [1, 2], "b": [0.5, 1.5]} and out.index.tolist() == [0, 1]


def test_an_empty_table_keeps_its_columns_and_counts_as_done(store):
    store.unit("k", {}, lambda: pd.DataFrame(columns=["a", "b"]))
    assert list(store.unit("k", {}, never).columns) == ["a", "b"]


def test_table_concatenates_the_units_of_a_kind(store):
    for seed in range(3):
        store.unit("sweep", {"model": "m", "seed": seed}, lambda seed=seed: [{"seed": seed, "i": i} for i in (0, 1)])
    store.unit("other", {"seed": 0}, lambda: [{"seed": 99, "i": 0}])
    table = store.table("sweep")
    assert sorted(zip(table.seed, table.i, strict=True)) == [(s, i) for s in range(3) for i in (0, 1)]
    assert table.index.tolist() == list(range(6))
    assert store.table("sweep", seed=2).seed.tolist() == [2, 2]
    assert store.table("sweep", nothing=2).empty and store.table("unknown").empty
    assert store.has("sweep", {"seed": 1, "model": "m"}) and not store.has("sweep", {"seed": 1})


def test_provenance_stands_in_the_header_and_not_in_the_hash(store, monkeypatch):
    store.unit("k", {"a": 1}, lambda: [{"x": 1}])
    versions = results.provenance()["versions"]
    later = {"versions": versions, "device": "another", "created": "later"}
    monkeypatch.setattr(results, "provenance", lambda *a: later)
    store.unit("k", {"a": 1}, never)
    (path,) = files(store)
    header = json.loads(path.read_text().split("\n")[0])
    assert header["inputs"] == {"a": 1} and header["kind"] == "k" and path.stem == unit_hash("k", {"a": 1})
    about = header["provenance"]
    assert about["versions"]["textloc_utils"] and about["versions"]["torch"] and about["device"]
    assert about["created"].endswith("+00:00")
    # Another build of the same version is the same; after an upgrade it is computed anew, in place of the old one.
    versions["torch"] = versions["torch"].partition("+")[0] + "+cu999"
    store.unit("k", {"a": 1}, never)
    versions["diffusers"] = "999.0"
    assert not store.has("k", {"a": 1})
    assert store.unit("k", {"a": 1}, lambda: [{"x": 2}]).x.tolist() == [2]
    assert files(store) == [path] and store.has("k", {"a": 1})


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
    store.unit("k", {}, lambda: [{"x": 1}, {"x": 2}])
    (path,) = files(store)
    path.write_text(damage(path.read_text()))
    with pytest.raises(TextlocError, match="damaged") as error:
        store.table("k")
    assert path.name in str(error.value) and "\n" not in str(error.value)
    with pytest.warns(UserWarning, match="damaged") as caught:
        table = store.unit("k", {}, lambda: [{"x": 1}, {"x": 2}])
    assert len(caught) == 1 and table.x.tolist() == [1, 2]
    assert store.unit("k", {}, never).x.tolist() == [1, 2]


def test_a_computation_that_fails_stores_nothing(store):
    with pytest.raises(ZeroDivisionError):
        store.unit("k", {}, lambda: [{"x": 1 / 0}])
    assert files(store) == []


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_write_that_fails_leaves_neither_a_unit_nor_scraps(store, monkeypatch, failing):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(TextlocError, match="No space left"):
        store.unit("k", {}, lambda: [{"x": 1}])
    assert files(store) == []


def test_an_unwritable_folder_is_found_before_anything_is_computed(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(TextlocError, match="cannot write results") as error:
        Store(tmp_path / "file").unit("k", {}, never)
    assert "\n" not in str(error.value)
    monkeypatch.setattr(os, "access", lambda *a: False)
    with pytest.raises(TextlocError, match="Permission denied"):
        Store(tmp_path / "locked").unit("k", {}, never)
    with pytest.raises(TextlocError, match="Permission denied"):
        Store(tmp_path / "locked").publish("t", pd.DataFrame({"a": [1]}), {})
    assert not list((tmp_path / "locked").rglob("*.*"))


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b"])
def test_names_cannot_leave_the_store(store, name):
    for call in (
        lambda: store.unit(name, {}, never),
        lambda: store.table(name),
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
    store.unit("run", {"i": i}, lambda: compute(i))
"""


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
        assert len(store.table("run")) == 8_000 * finished  # whole units only
    subprocess.run(command, env=env, check=True)
    table = store.table("run")
    assert table.groupby("unit").size().to_dict() == {i: 8_000 for i in range(5)}
    computed = Counter(map(int, log.read_text().split()))
    assert sorted(computed) == list(range(5))
    assert computed.total() <= 5 + 2  # each kill costs at most the unit it hit
    assert computed[0] == computed[1] == 1


def _fill(root, worker):
    store = Store(root)
    for i in range(8):
        store.unit("crowd", {"worker": worker, "i": i}, lambda i=i: [{"worker": worker, "i": i}])
        store.unit("crowd", {"shared": i}, lambda i=i: [{"worker": -1, "i": i}])


def test_processes_share_a_store(tmp_path):
    store = Store(tmp_path)
    with ProcessPoolExecutor(3) as pool:
        list(pool.map(_fill, [tmp_path] * 3, range(3)))
    table = store.table("crowd")
    assert sorted(zip(table.worker, table.i, strict=True)) == [(w, i) for w in (-1, 0, 1, 2) for i in range(8)]
    assert not list(store.root.rglob("*.tmp"))


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
