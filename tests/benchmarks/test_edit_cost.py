"""What an edit costs against drawing source and target together, and its memory against its steps; Prompt-to-Prompt's
figures beside it from the same run."""

import resource
import statistics
import subprocess
import sys

import pytest

from textloc_utils import edit, models, scene_pairs
from textloc_utils.generate import generate

SHIPPED = [name for name, spec in models.registry().items() if spec.miniature]
REPEATS, STEPS = 5, 8


def methods(model):
    """What an edit costs does not hang on which layers it is: the middle one, all of them, and Prompt-to-Prompt."""
    middle = len(model.layers) // 2
    return [edit.localized((middle,)), edit.all_layers(model), edit.prompt_to_prompt(1.0)]


@pytest.mark.benchmark
@pytest.mark.parametrize("name", SHIPPED)
def test_an_edit_costs_what_source_and_target_cost(name):
    model = models.load(name, device="cpu")
    (pair,) = scene_pairs.for_model(model, 1, "report")
    ratios = {method.name: [] for method in methods(model)}
    for i in range(REPEATS + 1):
        plain = generate(model, [pair.source, pair.target], [pair.seed] * 2, steps=STEPS)
        for method in methods(model):
            made = edit.edit(model, pair, method, steps=STEPS, before=False)
            assert made.row_evaluations <= 1.05 * plain.row_evaluations
            if i:  # the first round warms up
                ratios[method.name].append(made.seconds / plain.seconds)
    for method in methods(model):
        few, many = (edit.edit(model, pair, method, steps=s, before=False) for s in (STEPS, 3 * STEPS))
        assert few.cache_bytes == many.cache_bytes
        rows, seconds = few.row_evaluations / plain.row_evaluations, statistics.median(ratios[method.name])
        held = f"caches {few.cache_bytes / 1024:.0f} KiB"
        print(f"\n{name}, {method.name}: rows {rows:.2f}, seconds {seconds:.2f}, {held}")
        assert seconds <= 1.25 or method.maps is not None


def peak(name: str, method: int, steps: int) -> int:
    """Peak resident kilobytes of a process that makes one edit by the method of this number."""
    command = [sys.executable, __file__, name, str(method), str(steps)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


@pytest.mark.benchmark
@pytest.mark.parametrize("method", range(3))
@pytest.mark.parametrize("name", SHIPPED)
def test_memory_does_not_grow_with_steps(name, method):
    few, many = peak(name, method, 4), peak(name, method, 40)
    print(f"\n{name}, method {method}: {few / 1024:.0f} MiB at 4 steps, {many / 1024:.0f} MiB at 40")
    assert many <= 1.05 * few


if __name__ == "__main__":
    loaded = models.load(sys.argv[1], device="cpu")
    (one,) = scene_pairs.for_model(loaded, 1, "report")
    edit.edit(loaded, one, methods(loaded)[int(sys.argv[2])], steps=int(sys.argv[3]), before=False)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
