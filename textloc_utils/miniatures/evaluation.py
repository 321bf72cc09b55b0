"""What a training run measures on the way: spelling, and the patch effect of every text layer."""

import numpy as np

from textloc_utils import prompts
from textloc_utils.generate import generate
from textloc_utils.miniatures import reader
from textloc_utils.models import Model, ModelSpec
from textloc_utils.patching import Patch

WORDS, PAIRS, STEPS = 32, 8, 10


def evaluate(pipe, spec: ModelSpec) -> dict:
    """Spelling on held-out words and, for held-out pairs, what patching each text layer alone does.

    Letters are read by template matching and compared place by place. Keys: ``exact`` and ``characters`` (over
    words), ``plain_source`` (source letters in the unpatched picture), ``plain_target``, ``all_layers`` (target
    letters with every layer patched), and per layer ``target`` (target letters) and ``source`` (source letters
    left), each a mean over pairs.
    """
    model = Model.from_pipeline(pipe, spec)
    todo = prompts.spelling_prompts(WORDS)
    spelled = generate(model, [p for p, _, _ in todo], [s for _, _, s in todo], steps=STEPS, batch_size=WORDS).images
    read = reader.read(spelled)
    layers = len(model.layers)
    sites = [(i,) for i in range(layers)] + [tuple(range(layers))]
    pairs = prompts.make_pairs(PAIRS, same_length=True)
    target, source = [], []
    for pair in pairs:
        # One batch: the target, the plain source, the source once per patched site.
        rows = [pair.target] + [pair.source] * (1 + len(sites))
        patches = [Patch(source=2 + i, target=0, layers=site) for i, site in enumerate(sites)]
        letters = reader.read(generate(model, rows, [pair.seed] * len(rows), patches=patches, steps=STEPS).images)
        target.append([reader.character_accuracy(text, pair.target_text) for text in letters])
        source.append([reader.character_accuracy(text, pair.source_text) for text in letters])
    target, source = np.mean(target, 0), np.mean(source, 0)
    return {
        "exact": round(float(np.mean([r == w for r, (_, w, _) in zip(read, todo, strict=True)])), 4),
        "characters": round(
            float(np.mean([reader.character_accuracy(r, w) for r, (_, w, _) in zip(read, todo, strict=True)])), 4
        ),
        "plain_target": round(float(target[0]), 4),
        "plain_source": round(float(source[1]), 4),
        "all_layers": round(float(target[-1]), 4),
        "target": np.round(target[2:-1], 4).tolist(),
        "source": np.round(source[2:-1], 4).tolist(),
    }
