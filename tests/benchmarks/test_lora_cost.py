"""Training adapters on the localized layers against all text layers: time and memory per step, in one run.

The gradient flows back no further than the first adapted layer, so what lies before it is neither kept nor passed
backwards; what a step saves depends on where the set begins, not only on how many layers it holds.
"""

import statistics
from dataclasses import replace

import pytest

from textloc_utils import lora, lora_looks, models
from textloc_utils.experiment import known_layers

SHIPPED = [name for name, spec in models.registry().items() if spec.miniature]
ROUNDS, STEPS, BATCH = 4, 6, 16


@pytest.mark.benchmark
@pytest.mark.parametrize("name", SHIPPED)
def test_localized_layers_cost_less_than_all(name):
    model = models.load(name, device="cpu")
    layers = known_layers(model)
    data = lora.prepare(model, *lora_looks.drawn_scenes(64))
    local = lora.Training(layers=layers, steps=STEPS, batch=BATCH)
    reports = {"localized": [], "all": []}
    for _ in range(ROUNDS):
        for kind, training in (("localized", local), ("all", replace(local, layers=tuple(range(len(model.layers)))))):
            reports[kind].append(lora.train(model, data, training))
            lora.remove(model)
    # Neighbouring runs share what else the machine does; the first round warms up.
    pairs = list(zip(*reports.values(), strict=True))[1:]
    seconds = statistics.median(a.seconds_per_step / b.seconds_per_step for a, b in pairs)
    kept = pairs[0][0].saved_bytes / pairs[0][1].saved_bytes
    print(
        f"\n{name}: layers {layers} of {len(model.layers)} against all: {seconds:.2f} of the time per step, "
        f"{kept:.2f} of the bytes kept for the backward pass"
    )
    assert kept < 1 and seconds < 1
