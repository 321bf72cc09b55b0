"""Pairs of prompts about scenes of the miniatures' worlds, which differ in the text, in another factor, or in both.

There are pairs that select a set of layers, pairs that choose a setting, and pairs for reported results. They use
different words, see USES.
"""

import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from textloc_utils import ocr, prompts
from textloc_utils.miniatures import evaluation, factors, world
from textloc_utils.models import Model, training_log
from textloc_utils.prompts import Pair
from textloc_utils.settings import TextlocError

#: The uses of pairs. "select" and "tune" each use half of the validation words. "report" uses the test words.
USES = ("select", "tune", "report")
#: Added to the seed of pairs without scenes. `textloc localize` adds nothing, so its pairs are not those of a report.
SEEDS = {"select": 2_000, "tune": 3_000, "report": 1_000}
#: The factors that can differ in a pair, in addition to the text.
FACTORS = ("material", "ink", "typeface", "sign")


@dataclass(frozen=True, kw_only=True)
class ScenePair(Pair):
    """A pair of prompts whose scenes are known.

    ``differs`` says in which factors the target's scene differs: "text", one of FACTORS, or both. The scenes also have
    the factors that the prompts do not name. A rendered picture of the source shows ``scene``.
    """

    scene: world.Scene
    target_scene: world.Scene
    differs: tuple[str, ...]

    @property
    def about(self) -> dict[str, str]:
        """Columns of a table: the factors that differ, and every factor of both scenes."""
        told = {"differs": " ".join(self.differs)}
        told |= {f"source_{name}": getattr(self.scene, name) for name in FACTORS}
        return told | {f"target_{name}": getattr(self.target_scene, name) for name in FACTORS}


def seen(pictures: np.ndarray, pair: Pair) -> tuple[list[dict[str, str]], np.ndarray]:
    """Read the factors in pictures (n, H, W, 3) of miniatures. The first picture is the one to keep.

    Returns a dict for each picture, with every one of FACTORS under its name plus ``_read``, and a mask (H, W). The
    mask is True outside the first picture's own text, with room for the longer one of the ``pair``'s two texts. It is
    True everywhere if no text is found.
    """
    found = factors.read(pictures)
    room = max(len(pair.source_text), len(pair.target_text))
    return [{f"{name}_read": getattr(each, name) for name in FACTORS} for each in found], found[0].outside_text(room)


def outside_text(model: Model, pictures: np.ndarray, pair: Pair) -> np.ndarray:
    """The mask outside the text of pictures (n, H, W, 3). The first picture is the one to keep.

    It comes from :func:`seen` for pictures of a miniature's world, and from ``ocr.outside`` for all others.
    """
    return ocr.outside(pictures, pictures[0]) if world_of(model) is None else seen(pictures[:1], pair)[1]


def words(use: str) -> list[str]:
    """The words of pairs for one of USES, without mild insults."""
    if use not in USES:
        raise TextlocError(f"unknown use {use!r}; allowed: {', '.join(USES)}")
    if use == "report":
        return prompts.test_words()
    # The list is sorted by frequency, so both halves have common and rare words.
    return list(prompts.words("validation"))[USES.index(use) :: 2]


def make(
    n: int,
    use: str,
    seed: int = 42,
    *,
    differs: tuple[str, ...] = ("text",),
    template: str | None = None,
    two_groups: bool = False,
    same_length: bool = False,
    only: world.World = world.SECOND,
) -> list[ScenePair]:
    """Make ``n`` pairs with the words of one of USES. Their scenes are of the world ``only`` and differ in ``differs``.

    Without a ``template``, the prompts name everything that the world's captions can name. The two words have no letter
    in common at the same position. So every letter that is read in a picture belongs to one of them. With
    ``two_groups``, the first letters of the two words belong to different materials, see ``world.GROUPS``. With
    ``same_length``, both words have the same length. The ink of both scenes is readable on their signs. The seeds of
    the pairs are ``seed``, ``seed`` + 1, and so on.
    """
    known = ("text", *FACTORS)
    if n < 1:
        raise TextlocError(f"at least one pair is needed, got {n}")
    if not differs or any(name not in known for name in differs):
        raise TextlocError(f"pairs differ in some of {', '.join(known)}, got {' '.join(differs) or 'nothing'}")
    for name in differs:
        if name != "text" and len({"typeface": only.typefaces, "material": only.materials}.get(name, (0, 1))) < 2:
            raise TextlocError(f"there is only one {name} in the {only.name} world, so no pair can differ in it")
    pool, rng = words(use), random.Random(f"{use} {seed} {differs} {template}")
    pairs: list[ScenePair] = []
    while len(pairs) < n:
        source, target = rng.sample(pool, 2)
        if any(a == b for a, b in zip(source, target, strict=False)):
            continue
        if two_groups and world.OWN[source[0]] == world.OWN[target[0]]:
            continue
        if same_length and len(source) != len(target):
            continue
        scene = world.random_scene(rng, only, text=source)
        other = {name: _others(scene, name, only) for name in differs if name != "text"}
        if not all(other.values()):
            continue
        changed: dict[str, Any] = {name: rng.choice(values) for name, values in other.items()}
        text = target if "text" in differs else source
        room = world.COLUMNS - len(text)
        target_scene = replace(scene, text=text, column=min(scene.column, room), **changed)
        pairs.append(
            ScenePair(
                source=_prompt(scene, template, only),
                target=_prompt(target_scene, template, only),
                source_text=source,
                target_text=text,
                seed=seed + len(pairs),
                scene=scene,
                target_scene=target_scene,
                differs=tuple(differs),
            )
        )
    return pairs


def world_of(model: Model) -> world.World | None:
    """The world in which a miniature was trained. None for other models."""
    log = training_log(model.spec) or {}
    return world.WORLDS.get(log.get("report", {}).get("world"))


def for_model(model: Model, n: int, use: str, seed: int = 42, *, template: str | None = None, **options) -> list[Pair]:
    """Make ``n`` pairs for a model with the words of one of USES.

    For a miniature, they are scenes of its world, see :func:`make`. For other models, they come from
    ``prompts.make_pairs``, with a different seed for each use. If a ``template`` is given, the pairs of other models
    use the template that names only the text.
    """
    only = world_of(model)
    if only is None:
        words(use)
        chosen = prompts.TEMPLATE if template is None else prompts.SIMPLE_TEMPLATE
        return prompts.make_pairs(n, seed + SEEDS[use], template=chosen)
    return list(make(n, use, seed, template=template, only=only, **options))


def _others(scene: world.Scene, name: str, only: world.World) -> list[str]:
    """The other values of a factor with which the scene's text is still readable."""
    if name == "sign":
        return [sign for sign, inks in world.READABLE.items() if scene.ink in inks and sign != scene.sign]
    values = {"ink": world.READABLE[scene.sign], "typeface": only.typefaces, "material": only.materials}[name]
    return [value for value in values if value != getattr(scene, name)]


def _prompt(scene: world.Scene, template: str | None, only: world.World) -> str:
    if template is None:
        return evaluation.named(scene, only)
    used = {name: getattr(scene, name) for name in world.FACTORS if f"{{{name}}}" in template}
    return world.prompt(scene.text, template, **used)
