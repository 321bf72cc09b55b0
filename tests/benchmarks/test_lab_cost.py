"""What a picture costs in the browser's lab, against the package in one run: seconds on one thread, and memory."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_lab import DRAW, EXPORTED, START, address, browser, open_page  # noqa: F401

from textloc_utils import models, scene_pairs
from textloc_utils.generate import generate
from textloc_utils.patching import Patch

ROUNDS = 3
SLOWER, HUNGRIER = 8.0, 1.5  # how much more than the package a picture in the browser may take


def job_of(name: str) -> tuple[dict, dict, list]:
    """A job of the lab's worker with its words, and the same as prompts of the package: target, source, patched."""
    model = models.load(name, device="cpu")
    pair = scene_pairs.for_model(model, 1, "report")[0]
    places = len(model.layers) + (model.pooled_site is not None)
    masks = [[0.0] * places, [0.0] * places, [1.0] * places]
    job = {"prompts": [pair.target, pair.source], "seed": pair.seed, "start": 0, "masks": masks}
    return job, {"source": pair.source_text, "target": pair.target_text}, [pair.target, pair.source, pair.source]


def package(name: str) -> dict:
    """Seconds for the three pictures, the quickest of ROUNDS after one for warm-up, and the process's memory."""
    job, _, texts = job_of(name)
    model = models.load(name, device="cpu")
    patch = Patch(source=2, target=0, layers="all", pooled=model.pooled_site is not None)
    seconds = [generate(model, texts, [job["seed"]] * 3, patches=[patch]).seconds for _ in range(ROUNDS + 1)]
    return {"seconds": min(seconds[1:]), "bytes": psutil.Process().memory_info().rss}


def pages(process: psutil.Process) -> int:
    """Bytes of the largest process of a browser, which holds the page and its worker."""
    return max(child.memory_info().rss for child in process.children(recursive=True))


@pytest.mark.benchmark
@pytest.mark.parametrize("name", EXPORTED)
def test_a_picture_in_the_browser_against_the_package(name, open_page):  # noqa: F811
    path = os.pathsep.join([str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    ran = subprocess.run(
        [sys.executable, __file__, name],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    own = json.loads(ran.stdout.splitlines()[-1])
    job, words, _ = job_of(name)
    page, _ = open_page("book/lab.html")
    began = time.perf_counter()
    page.evaluate(START, name)
    loading, seconds = time.perf_counter() - began, []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        page.evaluate(DRAW, [job, words])
        seconds.append(time.perf_counter() - began)
    memory, taken = pages(psutil.Process()), min(seconds[1:])
    print(
        f"\n{name}, source, target and patched: {taken:.2f} s in the browser after {loading:.1f} s of loading, "
        f"{own['seconds']:.2f} s in the package, ratio {taken / own['seconds']:.2f}; memory {memory / 2**20:.0f} MiB "
        f"against {own['bytes'] / 2**20:.0f} MiB, ratio {memory / own['bytes']:.2f}"
    )
    assert taken < SLOWER * own["seconds"] and memory < HUNGRIER * own["bytes"]


if __name__ == "__main__":
    print(json.dumps(package(sys.argv[1])))
