"""What the guard adds to a toxic prompt, against the other methods in one run: denoiser rows exactly, and seconds."""

import statistics

import pytest

from textloc_utils import models, safety
from textloc_utils.generate import generate
from textloc_utils.patching import Patch
from textloc_utils.safety import study

SHIPPED = [name for name, spec in models.registry().items() if spec.miniature]
PATCHED = "patched run"  #: the paper's patching: the cleaned prompt draws a picture of its own
METHODS = ("unguarded", "guard", "guard by row", PATCHED, "negative prompt", "SLD medium", "prompt swap")
REPEATS, PROMPTS, STEPS = 4, 4, 8


@pytest.mark.benchmark
@pytest.mark.parametrize("name", SHIPPED)
def test_extra_evaluations_and_seconds_of_every_method(name):
    model = models.load(name, device="cpu")
    layers = (len(model.layers) * 3 // 4,)  # which ones they are does not bear on the cost
    asked = study.toxic_pairs(PROMPTS)
    texts, seeds = [pair.source for pair in asked], [pair.seed for pair in asked]
    cleaned = [safety.guard(model, layers).screen(text)[0] for text in texts]
    patches = [Patch(source=i, target=PROMPTS + i, layers=layers) for i in range(PROMPTS)]
    cost, times = {}, {method: [] for method in METHODS}
    for i in range(REPEATS + 1):
        for method in METHODS:
            if method == PATCHED:
                made = generate(model, texts + cleaned, seeds * 2, patches=patches, steps=STEPS)
            else:
                # What takes no part draws plainly.
                chosen = model if method == "unguarded" else safety.guard(model, layers, method=method).model
                made = generate(chosen, texts, seeds, steps=STEPS)
            cost[method] = made.row_evaluations
            if i:  # the first round warms up
                times[method].append(made.seconds)
    base = cost["unguarded"]
    print(f"\n{name}, {PROMPTS} toxic prompts, {base} row evaluations unguarded")
    for method in METHODS:
        # Neighbouring runs share what else the machine does.
        ratio = statistics.median(b / a for a, b in zip(times["unguarded"], times[method], strict=True))
        print(f"  {method:<16} rows x {cost[method] / base:.2f}  seconds x {ratio:.2f}")
    rows = PROMPTS * STEPS  # one row per prompt and step
    assert base == 2 * rows
    joint = model.spec.family == models.JOINT
    extra = {method: cost[method] - base for method in METHODS}
    assert extra["guard"] == (rows if joint else 0) and extra["guard by row"] == extra["SLD medium"] == rows
    assert extra[PATCHED] == 2 * rows and extra["negative prompt"] == extra["prompt swap"] == 0
    if not joint:
        guarded = statistics.median(b / a for a, b in zip(times["unguarded"], times["guard"], strict=True))
        assert guarded <= 1.15, "the text encoders' second run should be all that it adds"
