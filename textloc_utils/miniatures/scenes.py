"""Rendered scenes: a coloured wall, a coloured sign, a word; the captions name all three.

A scene separates the text from the rest: the caption fixes colours, shape and text, the noise is left
the height at which the sign hangs. Letters stand in fixed columns from the left, so that the place of a letter
does not depend on the letters beside it. They are composed from an atlas of one bold monospace typeface (DejaVu
Sans Mono Bold, carried by matplotlib), so that thousands of scenes a second can be drawn on one core.
"""

import functools
import random
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from textloc_utils import prompts
from textloc_utils.miniatures import world
from textloc_utils.prompts import COLOURS, LETTERS, SHAPES

HEIGHT, WIDTH = 64, 128
PITCH = 16  #: pixels from letter to letter
CELL_HEIGHT = 24
LEFT = 16  #: first letter's column: every letter stands in a 16-pixel column of its own
HEIGHTS = (-4, -2, 0, 2, 4)  #: where the noise may hang the sign, in pixels below the middle
MAX_LETTERS = 6
LONG = 7  #: letters that a banner holds, which spans the picture; no miniature was trained on so many
TYPEFACE = "DejaVuSansMono-Bold.ttf"

RGB = {
    "red": (200, 40, 45),
    "orange": (240, 140, 30),
    "yellow": (245, 220, 70),
    "green": (40, 140, 65),
    "blue": (45, 85, 200),
    "purple": (135, 60, 165),
    "white": (238, 238, 238),
    "black": (28, 28, 28),
}
LIGHT = {"yellow", "orange", "white"}  #: signs that carry dark letters; the others carry light ones


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a picture shows; the sign with its text hangs ``dy`` pixels (one of HEIGHTS) below the middle."""

    wall: str
    sign: str
    shape: str
    text: str
    dy: int = 0


@functools.cache
def atlas(typeface: str = TYPEFACE) -> np.ndarray:
    """Letters A to Z as float32 coverage masks (26, CELL_HEIGHT, PITCH) in 0..1."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / typeface
    scale = 4
    font = ImageFont.truetype(str(path), int(PITCH / 0.602 * scale))
    out = np.zeros((26, CELL_HEIGHT, PITCH), np.float32)
    for i, letter in enumerate(LETTERS):
        cell = Image.new("L", (PITCH * scale, CELL_HEIGHT * scale))
        ImageDraw.Draw(cell).text((PITCH * scale / 2, CELL_HEIGHT * scale / 2 + 9.5 * scale), letter, 255, font, "ms")
        out[i] = np.asarray(cell.resize((PITCH, CELL_HEIGHT), Image.Resampling.BOX)) / 255
    return out


def text_box(scene: Scene) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the letters' cells in pixels."""
    top = HEIGHT // 2 - CELL_HEIGHT // 2 + scene.dy
    return LEFT, top, LEFT + PITCH * len(scene.text), top + CELL_HEIGHT


def letters_region() -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of all pixels where letters can stand."""
    half = CELL_HEIGHT // 2 + max(HEIGHTS)
    return LEFT, HEIGHT // 2 - half, LEFT + PITCH * MAX_LETTERS, HEIGHT // 2 + half


def render(scene: Scene, typeface: str = TYPEFACE) -> np.ndarray:
    """Draw one scene: uint8 (HEIGHT, WIDTH, 3)."""
    most = LONG if scene.shape == "banner" else MAX_LETTERS
    if not 1 <= len(scene.text) <= most:
        raise ValueError(f"a {scene.shape} holds 1 to {most} letters, got {scene.text!r}")
    wall, sign = (np.array(RGB[c], np.float32) for c in (scene.wall, scene.sign))
    ink = np.array(RGB["black" if scene.sign in LIGHT else "white"], np.float32)
    top = max(HEIGHTS) - scene.dy
    mask = world.sign_mask(scene.shape)[top : top + HEIGHT, :, None]
    picture = wall + (sign - wall) * mask
    letters = atlas(typeface)[[LETTERS.index(c) for c in scene.text]]
    strip = letters.transpose(1, 0, 2).reshape(CELL_HEIGHT, -1)[:, :, None]
    x0, y0, x1, y1 = text_box(scene)
    picture[y0:y1, x0:x1] += (ink - picture[y0:y1, x0:x1]) * strip
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def read_colours(picture: np.ndarray) -> tuple[str, str]:
    """Names of the colours of wall and sign in a drawn picture, uint8 (HEIGHT, WIDTH, 3): the nearest in the palette.

    The wall is read along the top edge, the sign left of the first letter, where its own colour shows at every height
    it can hang at.
    """
    palette = np.array([RGB[c] for c in COLOURS], float)

    def nearest(pixels: np.ndarray) -> str:
        return COLOURS[int(np.linalg.norm(palette - np.median(pixels.reshape(-1, 3), axis=0), axis=1).argmin())]

    return nearest(picture[:4]), nearest(picture[HEIGHT // 2 - 8 : HEIGHT // 2 + 8, 9 : LEFT - 2])


def caption(scene: Scene, rng: random.Random) -> str:
    """One of the templates that fit the scene; sometimes SimpleBench's, which leaves the colours open."""
    if scene.shape == "sign" and rng.random() < 0.15:
        template = prompts.SIMPLE_TEMPLATE
    else:
        template = rng.choice(prompts.TEMPLATES[scene.shape])
    return template.format(wall=scene.wall, sign=scene.sign, text=scene.text)


def random_scene(rng: random.Random, lengths: tuple[int, ...] = (3, 4, 5, 6)) -> Scene:
    """A training scene of one of the ``lengths``: a training word or a random string, half of each."""
    length = rng.choice(lengths)
    text = rng.choice(_words_by_length()[length]) if rng.random() < 0.5 else prompts.random_string(rng, length)
    wall, sign = rng.sample(COLOURS, 2)
    return Scene(wall=wall, sign=sign, shape=rng.choice(SHAPES), text=text, dy=rng.choice(HEIGHTS))


def long_scene(rng: random.Random) -> tuple[Scene, str]:
    """A banner with seven letters, a training word or a random string, half of each, and its caption."""
    text = rng.choice(prompts.long_words("train")) if rng.random() < 0.5 else prompts.random_string(rng, LONG)
    wall, sign = rng.sample(COLOURS, 2)
    scene = Scene(wall=wall, sign=sign, shape="banner", text=text, dy=rng.choice(HEIGHTS))
    return scene, caption(scene, rng)


@functools.cache
def _words_by_length() -> dict[int, list[str]]:
    return {n: [w for w in prompts.words("train") if len(w) == n] for n in (3, 4, 5, 6)}
