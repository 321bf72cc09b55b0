"""The measurements during a training run, on validation words: spelling, and the patch effect of every text layer."""

import random

import numpy as np

from textloc_utils import prompts
from textloc_utils.generate import generate
from textloc_utils.miniatures import factors, world
from textloc_utils.models import Model, ModelSpec
from textloc_utils.patching import Patch

WORDS, STEPS = 48, 10
SEED = 1_000
UNGUIDED = 1.0  #: guidance of patched pictures (none, because there are many and guidance doubles their cost)
#: Each layer is patched alone only if the prompt, or a patch of all layers, writes at least this share of letters at
#: their position. Before that, there is no text that a layer could change.
SPELLS = 0.12


def scenes(words: list[str], seed: int, only: world.World = world.SECOND) -> list[world.Scene]:
    """One scene for each word. All other factors are drawn with ``seed``."""
    rng = random.Random(f"{seed} scenes")
    return [world.random_scene(rng, only, text=word) for word in words]


def named(scene: world.Scene, only: world.World = world.SECOND) -> str:
    """The prompt that names everything that the world's captions can name."""
    kept = [k for k in ("typeface", "ink") if only.named[k]]
    letters = f" in {' '.join(getattr(scene, k) for k in kept)} letters" if kept else ""
    material = " against {material}" if only.named["material"] else ""
    template = "{a} {sign} {shape}" + material + ' says "{text}"' + letters + "."
    return world.prompt(scene.text, template, **{k: getattr(scene, k) for k in world.FACTORS})


def named_factors(only: world.World) -> list[str]:
    """The factors that the world's captions can name."""
    return [k for k in world.FACTORS if only.named["sign" if k == "shape" else k]]


def validation_pairs(n: int) -> list[tuple[str, str]]:
    """``n`` pairs (source word, target word) of equal length, without a common letter at the same position."""
    rng, pool = random.Random("pairs"), list(prompts.words("validation"))
    pairs: list[tuple[str, str]] = []
    while len(pairs) < n:
        source, target = rng.sample(pool, 2)
        if len(source) == len(target) and not any(a == b for a, b in zip(source, target, strict=True)):
            pairs.append((source, target))
    return pairs


def evaluate(pipe, spec: ModelSpec, *, pairs: int, only: world.World = world.SECOND) -> dict:
    """Measure spelling on validation words, and the effect of patching each text layer alone on ``pairs`` pairs.

    All texts are read by template matching. Some keys are measured on WORDS prompts that name everything: ``exact``,
    ``characters`` (letters at their position), and one key for each named factor. Two keys are measured on the same
    words with nothing named: ``exact_open``, and ``own_material`` (how often the material belongs to the first letter).

    The other keys are measured on the pairs, whose prompts name everything and are drawn without guidance:
    ``plain_source`` and ``plain_target`` (letters of their own text in the unpatched pictures), ``all_layers`` and
    ``exact_all_layers`` (target letters and whole target words with every layer patched). When the prompt or this patch
    spells, there are also lists by layer: ``target`` (target letters), ``source`` (source letters that are left) and
    ``exact_layers`` (whole target words).
    """
    model = Model.from_pipeline(pipe, spec)
    words = list(prompts.words("validation"))
    rng = random.Random("spelling")
    shown = scenes(rng.sample(words, WORDS), SEED, only)
    seeds = [SEED + i for i in range(WORDS)]

    def draw(asked: list[str]) -> list[factors.Reading]:
        return factors.read(generate(model, asked, seeds, steps=STEPS, batch_size=WORDS).images)

    read = draw([named(s, only) for s in shown])
    result = {
        "exact": np.mean([r.text == s.text for r, s in zip(read, shown, strict=True)]),
        "characters": np.mean([factors.character_accuracy(r.text, s.text) for r, s in zip(read, shown, strict=True)]),
    }
    said = named_factors(only)
    result |= {k: np.mean([getattr(r, k) == getattr(s, k) for r, s in zip(read, shown, strict=True)]) for k in said}
    if only.named["material"]:
        read = draw([world.prompt(s.text, world.OPEN) for s in shown])
        result["exact_open"] = np.mean([r.text == s.text for r, s in zip(read, shown, strict=True)])
        result["own_material"] = np.mean([r.material == world.OWN[s.text[0]] for r, s in zip(read, shown, strict=True)])
    spells = result["characters"] >= SPELLS
    patched = _patched(model, pairs, only, alone=bool(spells))
    if not spells and patched["all_layers"] >= SPELLS:  # a patch may write earlier than the prompt
        patched = _patched(model, pairs, only, alone=True)
    result |= patched
    return {
        k: [round(float(x), 4) for x in v] if isinstance(v, list) else round(float(v), 4) for k, v in result.items()
    }


def _patched(model: Model, pairs: int, only: world.World, *, alone: bool) -> dict:
    """Measure the pairs without a patch, with all layers patched, and, if ``alone``, with each layer patched alone."""
    layers = range(len(model.layers))
    sites = [(i,) for i in layers if alone] + [tuple(layers)]
    words = validation_pairs(pairs)
    kept = scenes([source for source, _ in words], SEED + 1, only)
    target, source, exact = [], [], []
    for i, ((old, new), scene) in enumerate(zip(words, kept, strict=True)):
        # One batch: the target, the plain source, the source once per patched site.
        prompt = named(scene, only)
        rows = [prompts.replace_text(prompt, new)] + [prompt] * (1 + len(sites))
        patches = [Patch(source=2 + j, target=0, layers=site) for j, site in enumerate(sites)]
        made = generate(model, rows, [SEED + i] * len(rows), patches=patches, steps=STEPS, guidance=UNGUIDED)
        texts = [r.text for r in factors.read(made.images)]
        target.append([factors.character_accuracy(text, new) for text in texts])
        source.append([factors.character_accuracy(text, old) for text in texts])
        exact.append([text == new for text in texts])
    target, source, exact = (np.mean(table, axis=0) for table in (target, source, exact))
    whole = {
        "plain_target": target[0],
        "plain_source": source[1],
        "all_layers": target[-1],
        "exact_all_layers": exact[-1],
    }
    by_layer = {"target": target, "source": source, "exact_layers": exact}
    return whole | ({key: values[2:-1].tolist() for key, values in by_layer.items()} if alone else {})
