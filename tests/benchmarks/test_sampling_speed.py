"""Pictures per second of every shipped miniature on the CPU, at the steps and guidance that the book uses."""

import json
import os
import subprocess
import sys

import pytest

from textloc_utils import models, prompts
from textloc_utils.generate import generate

BATCH, BATCHES = 16, 2
#: Pictures per second on two cores.
TARGETS = {"sd3-mini": 4.0}
SLOWEST = 1.0
SHIPPED = [name for name, spec in models.registry().items() if spec.miniature]


def measure(name: str) -> dict:
    """Sample ``BATCHES`` batches after one for warm-up; pictures/s and denoiser row evaluations per picture."""
    model = models.load(name, device="cpu")
    todo = prompts.spelling_prompts(BATCH * (BATCHES + 1))
    texts, seeds = [text for text, _, _ in todo], [seed for _, _, seed in todo]
    generate(model, texts[:BATCH], seeds[:BATCH], batch_size=BATCH)
    made = generate(model, texts[BATCH:], seeds[BATCH:], batch_size=BATCH)
    pictures = BATCH * BATCHES
    return {"pictures_per_second": pictures / made.seconds, "rows": made.row_evaluations / pictures}


@pytest.mark.benchmark
@pytest.mark.parametrize("name", SHIPPED)
def test_sampling_speed_on_all_cores(name):
    """In a process of its own: OMP_THREAD_LIMIT is read once, and torch.set_num_threads cannot go beyond it."""
    cores = str(os.cpu_count())
    threads = {"OMP_NUM_THREADS": cores, "OMP_THREAD_LIMIT": cores}
    ran = subprocess.run(
        [sys.executable, __file__, name], env=os.environ | threads, check=True, stdout=subprocess.PIPE, text=True
    )
    got = json.loads(ran.stdout.splitlines()[-1])
    speed, spec = got["pictures_per_second"], models.spec(name)
    print(f"\n{name}: {speed:.2f} pictures/s on {cores} cores, {got['rows']:.0f} denoiser rows per picture")
    assert got["rows"] == spec.steps * (2 if spec.guidance > 1 else 1)
    assert speed >= TARGETS.get(name, SLOWEST)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
