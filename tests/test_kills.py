"""Kills at random moments: what is started again ends at the same results, and nothing of the killed run is left.

A job is begun in a process of its own, killed at a moment drawn from the time that a whole run takes, and run again to
its end. ``TEXTLOC_KILLS`` says how many moments are tried of each job.
"""

import json
import os
import random
import re
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pytest
import tiny
from safetensors import safe_open
from test_notebooks import write
from test_training import TINY, quietly

import textloc_utils as tl
from conftest import started
from textloc_utils import files, lora, prompts
from textloc_utils.book import explorer, notebooks
from textloc_utils.experiment import Experiment
from textloc_utils.miniatures import training
from textloc_utils.results import Store

#: Of each job; the suite's share of the twenty that are tried once in a while.
KILLS = int(os.environ.get("TEXTLOC_KILLS", 2))
PAIRS = 3
CAPTIONS = ['a red sign that says "hello"', 'a blue sign that says "world"', 'a sign that says "river"', "a wall"]
#: Says that its kernel has begun, and takes a while.
CELLS = ["import time\nfor i in range(5):\n    time.sleep(0.1)\n    print(i)", "print(sum(range(10**6)))"]


# --- the jobs: what is run in a folder, and what a user gets from it ---------------------------------------------


def sweep(folder: Path) -> None:
    found = tl.sweep(tiny.model("sd3"), prompts.make_pairs(PAIRS), steps=1, store=Store(folder / "store"))
    files.write_text(folder / "table.csv", found.table.to_csv())


def adapters(folder: Path) -> None:
    model = tiny.model("sd3")
    size = (len(CAPTIONS), model.spec.height, model.spec.width, 3)
    data = lora.prepare(model, np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8), CAPTIONS)
    settings = lora.Training(layers=(1,), rank=2, steps=20, batch=4, lr=1e-2)
    lora.train(model, data, settings, folder=folder / "adapter", checkpoint_steps=2)


def miniature(folder: Path) -> None:
    budget = replace(TINY, checkpoint_seconds=1e-9)
    cache = folder / "parts"
    training.train("sd3-mini", folder / "run", budget=budget, device="cpu", cache=cache, log=quietly)


def notebook(folder: Path) -> None:
    notebooks.WORK = folder / "work"
    notebooks.execute(notebooks.plan([folder / "one.ipynb"], {}))


def export(folder: Path) -> None:
    os.environ["TEXTLOC_DATA"] = str(folder / "data")
    explorer.publish(
        Experiment.of(tiny.model("ldm"), steps=1, store=Store(folder / "store")), prompts.make_pairs(PAIRS)
    )


def rows(path: Path) -> str:
    """A stored unit without its first line, which tells when it was made, and the digest of both."""
    return "\n".join(path.read_text().splitlines()[1:-1])


#: What differs from run to run in a file that says where it comes from; and how a tokenizer was called last, which is
#: saved with it and which no call reads.
UNLIKE = ("second", "created", "seal", "commit", "name_or_path", "truncation", "padding")


def untimed(path: Path) -> dict:
    """What a JSON file says, without when and by what code it was made, and how long that took."""

    def clean(value):
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items() if not any(part in k for part in UNLIKE)}
        return value

    return clean(json.loads(path.read_text()))


#: Job to the files that it is run for, each with how two of them are compared.
JOBS: dict[Callable[[Path], None], dict[str, Callable]] = {
    sweep: {"table.csv": Path.read_bytes, "store/units/*/*": rows},
    adapters: {f"adapter/{lora.FILE}": Path.read_bytes, f"adapter/{lora.ABOUT}": untimed},
    miniature: {"run/pipeline/*/*.safetensors": Path.read_bytes, "run/pipeline/**/*.json": untimed},
    notebook: {"one.ipynb": Path.read_bytes},
    export: {
        "data/results/explorer/*.csv": Path.read_bytes,
        "data/results/explorer/*.webp": Path.read_bytes,
        "data/results/explorer/*.json": untimed,
        "store/units/*/*": rows,
    },
}


def outcome(job, folder: Path) -> dict:
    found = {p.relative_to(folder): read(p) for how, read in JOBS[job].items() for p in sorted(folder.glob(how))}
    assert len(found) >= len(JOBS[job])
    return found


# --- kills -------------------------------------------------------------------------------------------------------


def begin(job, folder: Path) -> int:
    """Run a job in a process of its own, which is a copy of this one; returns its number."""
    folder.mkdir(exist_ok=True)
    if job is notebook and not (folder / "one.ipynb").exists():
        write(folder / "one.ipynb", *CELLS)
    if child := os.fork():
        return child
    status = 1
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        job(folder)
        status = 0
    finally:
        os._exit(status)


def finish(job, folder: Path) -> float:
    """Run a job to its end; returns the seconds that it took."""
    began = time.monotonic()
    assert os.waitpid(begin(job, folder), 0)[1] == 0, job.__name__
    return time.monotonic() - began


def names(folder: Path) -> list[str]:
    """All that lies in a folder; scratch files of notebooks have their place's digest in their names."""
    return sorted(re.sub("-[0-9a-f]{8}[.]", ".", str(path.relative_to(folder))) for path in folder.rglob("*"))


def check_whole(folder: Path) -> None:
    """Every file that has its name is whole, right after a kill."""
    for path in folder.rglob("*"):
        if not path.is_file() or any(part.startswith((".", "work", "tmp")) for part in path.parts[len(folder.parts) :]):
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as weights:
                assert list(weights.keys())
        elif path.suffix == ".ipynb":
            nbformat.validate(nbformat.read(path, 4))
        elif path.suffix in (".csv", ".jsonl"):
            assert path.read_text().endswith("\n")


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.__name__)
def test_killed_at_any_moment_it_ends_at_the_same_results(job, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SETTLED", -1)  # else what was left is removed after a minute only
    monkeypatch.setenv("TEXTLOC_STARTED", str(tmp_path))
    whole = tmp_path / "whole"
    seconds = finish(job, whole)
    wanted, hit, rng = outcome(job, whole), 0, random.Random(job.__name__)
    for i in range(KILLS):
        folder, temporary = tmp_path / str(i), tmp_path / f"temporary {i}"
        temporary.mkdir()
        monkeypatch.setenv("TMPDIR", str(temporary))
        monkeypatch.setattr(tempfile, "tempdir", str(temporary))
        child = begin(job, folder)
        time.sleep(rng.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        hit += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        deadline = time.monotonic() + 60
        while started(str(tmp_path)):  # what reads a page reads it to its end
            assert time.monotonic() < deadline, started(str(tmp_path))
            time.sleep(0.05)
        check_whole(folder)
        finish(job, folder)
        assert outcome(job, folder) == wanted, i
        left = [p for p in (*folder.rglob("*"), *temporary.rglob("*")) if p.name.startswith((".part-", "tess_", "tmp"))]
        # onnxruntime keeps the name of its session there.
        left += [p for p in temporary.rglob("*") if p.is_file() and p.name != ".ses"]
        assert not left and not started(str(tmp_path)), left
        assert names(folder) == names(whole)
    print(
        f"{job.__name__}: {hit} of {KILLS} kills before the end of a run of {seconds:.1f} s, all with the same results"
    )
