"""A sweep's time per picture against plain sampling at the same batch, in one run, and its memory against its steps."""

import resource
import statistics
import subprocess
import sys

import pytest

from textloc_utils import models, scene_pairs, sites, sweeps
from textloc_utils.experiment import Experiment
from textloc_utils.generate import generate

SHIPPED = [name for name, spec in models.registry().items() if spec.miniature]
REPEATS, STEPS = 5, 8


@pytest.mark.benchmark
@pytest.mark.parametrize("name", SHIPPED)
def test_a_patched_picture_costs_hardly_more_than_a_plain_one(name):
    model = models.load(name, device="cpu")
    pair = scene_pairs.for_model(model, 1, "report")[0]
    patched = sites.single_layers(model)
    asked = [pair.source, pair.target] + [pair.source] * len(patched)
    seeds = [pair.seed] * len(asked)
    patches = [patch for i, site in enumerate(patched) for patch in site.patches(2 + i, 1)]
    times = {"plain": [], "patched": []}
    for i in range(REPEATS + 1):
        for kind, chosen in (("plain", []), ("patched", patches)):
            made = generate(model, asked, seeds, patches=chosen, steps=STEPS, batch_size=len(asked))
            if i:  # the first round warms up
                times[kind].append(made.seconds)
    # Neighbouring runs share what else the machine does.
    ratio = statistics.median(b / a for a, b in zip(times["plain"], times["patched"], strict=True))
    print(f"\n{name}: {len(asked)} pictures, patched against plain {ratio:.3f}")
    assert ratio <= 1.1


def peak(name: str, steps: int) -> int:
    """Peak resident kilobytes of a process that patches every layer of one pair at so many steps."""
    ran = subprocess.run([sys.executable, __file__, name, str(steps)], check=True, stdout=subprocess.PIPE, text=True)
    return int(ran.stdout.splitlines()[-1])


@pytest.mark.benchmark
@pytest.mark.parametrize("name", SHIPPED)
def test_memory_does_not_grow_with_steps(name):
    few, many = peak(name, 4), peak(name, 40)
    print(f"\n{name}: {few / 1024:.0f} MiB at 4 steps, {many / 1024:.0f} MiB at 40")
    assert many <= 1.05 * few


if __name__ == "__main__":
    loaded = models.load(sys.argv[1], device="cpu")
    sweeps.patch_pair(Experiment.of(loaded, steps=int(sys.argv[2])), scene_pairs.for_model(loaded, 1, "report")[0])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
