"""What the guard adds to a toxic prompt, against the other methods in one run: denoiser rows exactly, and seconds."""

import statistics

import pytest

from textloc_utils import models, prompts, safety
from textloc_utils.generate import generate
from textloc_utils.patching import Patch

#: The localized layers; which ones they are does not bear on the cost.
LAYERS = {"ldm-mini": (8,), "sdxl-mini": (21,), "sd3-mini": (4, 5, 6)}
SHIPPED = [name for name, spec in models.registry().items() if spec.miniature]
METHODS = ("unguarded", "guard", "guard by row", safety.PATCHED_RUN, "negative prompt", "SLD medium", "prompt swap")
REPEATS, PROMPTS, STEPS = 4, 4, 8


@pytest.mark.benchmark
@pytest.mark.parametrize("name", SHIPPED)
def test_extra_evaluations_and_seconds_of_every_method(name):
    model = models.load(name, device="cpu")
    layers = LAYERS.get(name, (len(model.layers) * 3 // 4,))
    asked = prompts.toxic_prompts(PROMPTS)
    texts, seeds = [p for p, _, _ in asked], [s for _, _, s in asked]
    cleaned = [safety.guard(model, layers).screen(text)[0] for text in texts]
    patches = [Patch(source=i, target=PROMPTS + i, layers=layers) for i in range(PROMPTS)]
    cost, times = {}, {method: [] for method in METHODS}
    for i in range(REPEATS + 1):
        for method in METHODS:
            if method == safety.PATCHED_RUN:
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
    assert extra[safety.PATCHED_RUN] == 2 * rows and extra["negative prompt"] == extra["prompt swap"] == 0
    if not joint:
        guarded = statistics.median(b / a for a, b in zip(times["unguarded"], times["guard"], strict=True))
        assert guarded <= 1.15, "the text encoders' second run should be all that it adds"
