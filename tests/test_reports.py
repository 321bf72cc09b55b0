"""What is told about runs: memory, what they took, changed numbers, and what a larger run would take."""

import os
import re
import time

import nbformat
import pandas as pd
import pytest
from test_notebooks import PARAMETERS, write

from textloc_utils import cli, experiment, settings
from textloc_utils.book import compute, memory, notebooks, reports

GPU = "NVIDIA H100 80GB HBM3"
#: The driver's answer, with 40 GiB in use first and 79 GiB later; the second device does not tell its power.
SMI = f"""#!/bin/sh
[ -e "$0.later" ] && used=80896 || used=40960
touch "$0.later"
echo "0, {GPU}, $used, 81920, 350.5"
echo "1, Old card, 1024, 2048, [N/A]"
"""


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "WORK", tmp_path / "work")


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvidia-smi").write_text(SMI)
    (tmp_path / "bin/nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


def test_the_log_of_memory(tmp_path, gpu):
    path = tmp_path / "memory.csv"
    with memory.Log(path, 0.05):
        time.sleep(0.5)
        lines = path.read_text().splitlines()  # on the disk while the run goes on
    assert lines[0] == "time,device,used_gib,total_gib,watts" and len(lines) >= 4
    assert re.fullmatch(
        r"host \d+\.\d of \d+\.\d GiB, GPU 0 79\.0 of 80\.0 GiB, GPU 1 1\.0 of 2\.0 GiB", memory.peak(path)
    )
    assert memory.last(path).endswith("GPU 0 79.0 of 80.0 GiB, GPU 1 1.0 of 2.0 GiB")


def test_energy_is_power_over_time(tmp_path):
    path = tmp_path / "memory.csv"
    rows = [("10:00:00", "host", 1, 2, ""), ("10:00:00", "GPU 0", 1, 2, 360), ("10:00:10", "host", 1, 2, "")]
    rows += [("10:00:10", "GPU 0", 1, 2, 720), ("10:00:20", "GPU 0", 1, 2, 5)]
    table = pd.DataFrame(rows, columns=list(memory.COLUMNS))
    table.assign(time="2026-01-01T" + table.time).to_csv(path, index=False)
    assert memory.watt_hours(path) == pytest.approx(1 + 2)
    assert memory.watt_hours(tmp_path / "none.csv") is None and memory.peak(tmp_path / "none.csv") == "none"


def test_without_a_driver_there_is_the_host_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert memory.accelerators() == []
    with memory.Log(tmp_path / "missing" / "memory.csv"):  # nor does a disk that cannot be written end a run
        pass


def test_a_run_tells_what_it_took_and_which_numbers_changed(tmp_path, monkeypatch, gpu):
    monkeypatch.setattr(experiment, "data_dir", lambda: tmp_path / "data")
    say = "from textloc_utils import results\n_ = results.record('score', {})\n_ = results.record('n', 3)"
    path = write(tmp_path / "one.ipynb", say.format(0.5))
    summary = tmp_path / "summary.md"
    assert cli.main(["run", str(path), "--publish"]) == 0
    assert reports.recorded(path) == {"score": "0.5", "n": "3"} and reports.recorded(tmp_path / "none.ipynb") == {}
    book = nbformat.read(path, 4)
    book.cells[1].source = say.format(0.75)
    nbformat.write(book, path)
    assert cli.main(["run", str(path), "--summary", str(summary), "--publish"]) == 0
    text = summary.read_text()
    assert "| one | score | 0.5 | 0.75 |" in text and "| n |" not in text
    assert "GPU 0 79.0 of 80.0 GiB" in text and re.search(rf"\| one.ipynb \| \d+ s \| {GPU} \| [0-9a-f]{{10}} \|", text)
    row = compute.chapters().loc["one.ipynb"]
    assert row.seconds > 0 and row.device == GPU and row.commit
    # Nothing is executed: nothing changed, and the published time stays.
    assert cli.main(["run", str(path), "--summary", str(summary), "--publish"]) == 0
    assert summary.read_text().endswith("## Numbers that changed\n\nNone.\n")
    assert compute.chapters().loc["one.ipynb"].seconds == row.seconds


def test_mistakes_are_named_before_anything_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(notebooks, "_execute", lambda *a: pytest.fail("something ran"))
    path = write(tmp_path / "one.ipynb", "1")
    for arguments, said in (
        (["--summary", tmp_path], "is a folder; name a file"),
        (["--summary", tmp_path / "one.ipynb" / "x.md"], "is not a folder"),
        (
            ["--publish", "--seed", "1", "--out", tmp_path / "out"],
            "--publish is for notebooks with their own parameters",
        ),
        (["--estimate", "--publish"], "--estimate keeps no results"),
    ):
        assert cli.main(["run", str(path), *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_numbers_that_came_and_went():
    assert reports.changes({"a": "1", "b": "2"}, {"b": "2", "c": "3"}) == [("a", "1", ""), ("c", "", "3")]


def test_an_estimate_scales_the_units_of_a_real_small_run(tmp_path, capsys):
    """The smallest preset is executed; its units of work count as often as the larger preset has pairs and steps."""
    work = """
import time
from textloc_utils.results import Store
assert PRESET == "smoke"
for i in range(2):
    Store().unit("k", {"i": i, "models": MODELS}, lambda: [dict(x=time.sleep(0.5))], model=None)
"""
    path = write(tmp_path / "one.ipynb", work, parameters=PARAMETERS)
    before = path.read_bytes()
    assert cli.main(["run", str(path), "--estimate", "--models", "sdxl", "--preset", "paper"]) == 0
    told = capsys.readouterr().out
    assert "one.ipynb: about " in told and "its peak of memory: host" in told and "free disk" in told
    assert path.read_bytes() == before and not list((tmp_path / "work").glob("*.json"))
    (planned,) = notebooks.plan([path], {"PRESET": "paper"}, tmp_path / "out")
    (found,) = reports.estimate([planned], 50)
    # 200 pairs for smoke's 4, 50 steps for its 6.
    assert 1 <= found.units < found.smoke
    assert found.seconds == pytest.approx(found.smoke - found.units + found.units * (200 / 4) * (50 / 6))
    assert not (tmp_path / "out").exists()


def test_growth_is_that_of_the_presets():
    smoke, book = settings.preset("smoke"), settings.preset("book")
    assert reports._growth(smoke, book, 30) == (100 / 4) * (30 / 6)
    assert reports._growth(smoke, smoke, 30) == 1
