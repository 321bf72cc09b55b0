"""The page on compute tells what was recorded, and says so where nothing was; every file of the data has a licence."""

import fnmatch
import re
import subprocess

import numpy as np
import pandas as pd
import pytest

from textloc_utils import models
from textloc_utils.book import compute
from textloc_utils.results import Store
from textloc_utils.settings import ROOT


def test_energy_by_hand():
    # An hour of two processes: 2 x (12 W + 4 GB x 0.3725 W/GB) x 1.67
    assert compute.watt_hours(3600, 2) == pytest.approx(2 * 13.49 * 1.67)


def test_trainings_are_the_logs(monkeypatch):
    table = compute.trainings().set_index(["model", "part"])
    shipped = [spec for spec in models.registry().values() if spec.miniature]
    assert len(shipped) >= 4
    for spec in shipped:
        report = models.training_log(spec)["report"]
        assert table.seconds[spec.name, "denoiser"] == report["seconds"]
    known = {"seconds": 60, "device": "a GPU", "watt_hours": 7.5, "commit": "c0ffee"}
    known |= {"processes": 2, "parts": {"vae": {"seconds": 30}, "clip": {"steps": 9}}}
    monkeypatch.setattr(compute.models, "training_log", lambda spec: {"report": known})
    told = compute.trainings().query("model == 'sd3-mini'").set_index("part")
    assert told.watt_hours["denoiser"] == 7.5 and not told.estimated.any()
    assert np.isnan(told.watt_hours["vae"]) and np.isnan(told.seconds["clip"]) and told.commit["clip"] == "c0ffee"
    text = compute.page()["trainings"]
    assert "7.5 Wh, reported by the device" in text and "| sd3-mini | clip | a GPU, 1 process | not recorded |" in text


def test_trainings_of_a_study_count_once(monkeypatch):
    # A row per run and search, as the studies publish them; their minutes are those of the training.
    rows = [
        {"model": "sd3-mini", "run": run, "search": search, "minutes": 15.0}
        for run in ("seed-1", "seed-2")
        for search in ("exhaustive", "budgeted")
    ]
    monkeypatch.setattr(compute.studies, "together", lambda names: pd.DataFrame(rows))
    told = compute.trainings().set_index(["model", "part"])
    for run in ("seed-1", "seed-2"):
        part = told.loc["sd3-mini", f"study: {run}"]  # one row, or this would be a table
        assert part.seconds == 900 and part.estimated and part.watt_hours == pytest.approx(compute.watt_hours(900))


def test_tables_and_chapters(tmp_path, monkeypatch):
    store = Store(tmp_path / "results")
    monkeypatch.setattr(compute, "published_store", lambda: store)
    monkeypatch.setattr(compute, "_data", lambda: "")
    old = {"seconds": None, "reader": None, "commit": None, "command": None}
    store.publish("edit_a", pd.DataFrame({"x": [1]}), {"seconds": 120, "command": "textloc study edit a"})
    store.publish("edit_b", pd.DataFrame({"seconds": [1.5, 2.0]}), old)
    store.publish("safety_a", pd.DataFrame({"x": [1]}), old)
    store.publish("localize_a", pd.DataFrame({"x": [1]}), old | {"found": {"seconds": 3.0}})
    Store(tmp_path / "results/explorer").publish("a", pd.DataFrame({"x": [1]}), {"seconds": 2})
    table = compute.tables().set_index("table")
    assert table.seconds.fillna(-1).to_dict() == {"edit_a": 120, "edit_b": 3.5, "localize_a": 3, "safety_a": -1, "a": 2}
    assert table.partly.to_dict() == {"edit_a": False, "edit_b": True, "localize_a": True, "safety_a": True, "a": False}
    shown = compute.page()
    assert "1 of 5 tables have no seconds at all, and for 2 only" in shown["total"]
    assert "| `edit_a` |" in shown["tables"] and "`textloc study edit a`" in shown["tables"]
    row = next(line for line in shown["tables"].splitlines() if "safety_a" in line)
    assert row.count("not recorded") == 4
    row = next(line for line in shown["chapters"].splitlines() if "05_editing" in line)
    assert "| 2 | at least 2 min | not recorded |" in row
    done = {"notebook": ["05_editing.ipynb"], "seconds": [90.0], "device": ["CPU"], "commit": [""], "created": [""]}
    store.publish("chapters", pd.DataFrame(done), {})
    row = next(line for line in compute.page()["chapters"].splitlines() if "05_editing" in line)
    assert "| 2 | at least 2 min | 90 s |" in row
    assert "chapters" not in compute.tables().table.tolist()


def test_the_page_has_a_place_for_everything():
    text = (ROOT / "book" / "compute.md").read_text()
    assert set(re.findall(r"<!-- (\w+) -->", text)) == set(compute.page())
    # Every published table belongs to a chapter.
    published = {path.stem for path in (ROOT / "data" / "results").glob("*.csv")} - {"chapters"}
    assert published <= set(compute.tables().table)


def test_every_file_of_the_data_has_a_source_and_a_licence():
    lines = (ROOT / "data" / "README.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    assert rows and all(len(row) == 4 and all(row) for row in rows)
    patterns = {p: i for i, row in enumerate(rows) for p in re.findall("`([^`]+)`", row[0])}
    listing = ["git", "ls-files", "data", "textloc_utils"]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    files = [name for name in listed if not name.endswith(".py")]
    assert len(files) > 100

    def rows_of(file: str) -> set[int]:
        return {i for p, i in patterns.items() if fnmatch.fnmatch(file, p) and (p.endswith("**") or same(p, file))}

    def same(pattern: str, file: str) -> bool:
        return pattern.count("/") == file.count("/")

    assert {file: rows_of(file) for file in files if len(rows_of(file)) != 1} == {}
    used = {p for p in patterns for file in files if fnmatch.fnmatch(file, p)}
    assert used == set(patterns)
