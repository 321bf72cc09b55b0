"""The miniatures' world: a word on a sign in front of a material, with captions that name some of these factors.

A caption always gives the text. It names each other factor only sometimes. The noise decides the factors that are not
named. The material also depends on the text: each material has a group of first letters, and a word is in front of its
own group's material in four of five scenes. This link replaces the links that large models learn from photographs. For
example, a sign with the word OCEAN is often near the sea. The link also holds for new words, because it depends only on
the first letter.

- **text**: a word of 3 to 6 letters or a random string. It is always named.
- **place**: words start at the left, at five heights. It is never named. See :data:`EVERYWHERE`.
- **ink**: 4 colours, at least 60 grey levels away from the sign's colour. It is named in 30 % of the captions.
- **typeface**: 3 typefaces. It is named in 20 %.
- **sign**: 8 colours and 3 shapes. Both are named together, in 50 %.
- **material**: 6 materials, each with a range of colours and a random phase. It is named in 40 %.
"""

import functools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from textloc_utils import prompts
from textloc_utils.prompts import LETTERS

HEIGHT, WIDTH = 64, 128
PITCH = 16  #: pixels from letter to letter
CELL_HEIGHT = 24
LEFT = 16  #: pixels left of the first column
COLUMNS = 6  #: columns of letters; a word fills neighbouring columns
HEIGHTS = (-4, -2, 0, 2, 4)  #: positions of the sign, in pixels below the middle
EDGE = 8  #: number of rows at the top and at the bottom that no sign covers
LENGTHS = (3, 4, 5, 6)  #: numbers of letters of a word
CONTRAST = 60  #: smallest difference between ink and sign in grey levels

SHAPES = ("sign", "plate", "banner")
#: Typefaces by their names in captions. The files come with matplotlib.
TYPEFACES = {
    "plain": "DejaVuSansMono-Bold.ttf",
    "serif": "DejaVuSerif-Bold.ttf",
    "slanted": "DejaVuSans-BoldOblique.ttf",
}
SIGNS = {
    "red": (200, 40, 45),
    "orange": (240, 140, 30),
    "yellow": (245, 220, 70),
    "green": (40, 140, 65),
    "blue": (45, 85, 200),
    "purple": (135, 60, 165),
    "white": (238, 238, 238),
    "black": (28, 28, 28),
}
INKS = {"black": (20, 20, 20), "white": (245, 245, 245), "red": (200, 40, 45), "yellow": (245, 220, 70)}
#: Each material's first letters. All groups have about the same number of words.
GROUPS = {
    "brick": "JSVY",
    "planks": "CEGKU",
    "tiles": "BIMNX",
    "leaves": "HPQR",
    "clouds": "DOTWZ",
    "plaster": "AFL",
}
MATERIALS = tuple(GROUPS)
#: Dark and light colours of each material, at both ends of its range.
RANGES = {
    "brick": (((140, 60, 45), (205, 190, 180)), ((180, 95, 70), (225, 215, 205))),
    "planks": (((85, 55, 30), (175, 125, 70)), ((110, 80, 50), (215, 170, 115))),
    "tiles": (((50, 125, 140), (215, 230, 230)), ((95, 165, 175), (235, 245, 245))),
    "leaves": (((20, 65, 30), (85, 140, 50)), ((35, 90, 40), (120, 170, 75))),
    "clouds": (((95, 150, 215), (225, 235, 245)), ((130, 180, 230), (250, 250, 255))),
    "plaster": (((205, 180, 160), (230, 205, 185)), ((225, 205, 190), (245, 228, 212))),
}
TINTS = 8  #: number of colours of each range
PHASE = 48  #: a material's pattern starts at one of 48 x 48 positions


def grey(colour: Sequence[float]) -> float:
    """Luminance of an RGB colour, 0 to 255 (ITU-R BT.601)."""
    return float(np.dot(colour, (0.299, 0.587, 0.114)))


#: The inks that can be read on each sign.
READABLE = {
    sign: tuple(ink for ink, rgb in INKS.items() if abs(grey(rgb) - grey(ground)) >= CONTRAST)
    for sign, ground in SIGNS.items()
}
#: The material of each first letter.
OWN = {letter: material for material, letters in GROUPS.items() for letter in letters}


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The content of one picture.

    ``column`` is the column of the first letter, counted from 0. The sign and its text are ``dy`` pixels (one of
    HEIGHTS) below the middle. ``tint`` (0 to TINTS - 1) and ``phase`` (pixels down and right, less than PHASE) vary the
    material.
    """

    text: str
    ink: str = "black"
    typeface: str = "plain"
    sign: str = "white"
    shape: str = "sign"
    material: str = "plaster"
    column: int = 0
    dy: int = 0
    tint: int = 0
    phase: tuple[int, int] = (0, 0)


@dataclass(frozen=True, kw_only=True)
class World:
    """A set of possible scenes and captions.

    ``named`` says how often a caption names each factor. ``pull`` says how often the material belongs to the first
    letter.
    """

    name: str
    typefaces: tuple[str, ...] = tuple(TYPEFACES)
    shapes: tuple[str, ...] = SHAPES
    materials: tuple[str, ...] = MATERIALS
    free_columns: bool = True
    pull: float = 0.8
    named: dict = field(default_factory=lambda: {"ink": 0.3, "typeface": 0.2, "sign": 0.5, "material": 0.4})


SECOND = World(name="second", free_columns=False)
#: The same world, but words may start in any column in which they fit. Autoencoders, text encoders and readers are
#: trained on it, so that they know letters in all columns. Denoisers did not learn it. After 329,000 samples, sd3-mini
#: wrote 0.82 of the words that fill the sign. It wrote only 0.14 of the words whose first column the noise decides. In
#: the others, letters were doubled or missing.
EVERYWHERE = World(name="everywhere")
#: One wall, one shape, one typeface, words at the left, everything named. It is for studies that need many trainings.
PLAIN = World(
    name="plain",
    typefaces=("plain",),
    shapes=("sign",),
    materials=("plaster",),
    free_columns=False,
    named={"ink": 1.0, "typeface": 0.0, "sign": 1.0, "material": 0.0},
)
WORLDS = {w.name: w for w in (SECOND, PLAIN)}


# --- drawing ---------------------------------------------------------------------------------------------------


@functools.cache
def atlas(typeface: str) -> np.ndarray:
    """Letters A to Z of a typeface as float32 coverage masks (26, CELL_HEIGHT, PITCH) in 0..1.

    A letter that is too wide or too high for its cell is made smaller in this direction.
    """
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / TYPEFACES[typeface]
    scale = 4
    font = ImageFont.truetype(str(path), int(PITCH / 0.602) * scale)
    wide, high = PITCH * scale, CELL_HEIGHT * scale
    out = np.zeros((26, CELL_HEIGHT, PITCH), np.float32)
    for i, letter in enumerate(LETTERS):
        canvas = Image.new("L", (3 * wide, 2 * high))
        ImageDraw.Draw(canvas).text((1.5 * wide, high / 2 + 9.5 * scale), letter, 255, font, "ms")
        left, top, right, bottom = canvas.getbbox()
        size = min(right - left, wide - scale), min(bottom, high) - top
        ink = canvas.crop((left, top, right, bottom)).resize(size, Image.Resampling.BICUBIC)
        cell = Image.new("L", (wide, high))
        cell.paste(ink, ((wide - ink.width) // 2, top))
        out[i] = np.asarray(cell.resize((PITCH, CELL_HEIGHT), Image.Resampling.BOX)) / 255
    return out


@functools.cache
def sign_mask(shape: str) -> np.ndarray:
    """Coverage of a sign in the middle of a canvas with a margin above and below, float32 (H + 2 max(HEIGHTS), W)."""
    scale = 4
    h, w = HEIGHT + 2 * max(HEIGHTS), WIDTH
    cx, cy = w / 2, h / 2
    half = {"sign": (58, 18), "plate": (60, 19), "banner": (w, 16)}[shape]
    canvas = Image.new("L", (w * scale, h * scale))
    box = [(cx - half[0]) * scale, (cy - half[1]) * scale, (cx + half[0]) * scale - 1, (cy + half[1]) * scale - 1]
    draw = ImageDraw.Draw(canvas)
    if shape == "plate":
        draw.rounded_rectangle(box, 16 * scale, fill=255)
    else:
        draw.rectangle(box, fill=255)
    return np.asarray(canvas.resize((w, h), Image.Resampling.BOX)).astype(np.float32) / 255


@functools.cache
def pattern(material: str) -> np.ndarray:
    """A material's pattern, float32 (HEIGHT + PHASE, WIDTH + PHASE), from 0 (dark colour) to 1 (light colour)."""
    h, w = HEIGHT + PHASE, WIDTH + PHASE
    y, x = np.mgrid[:h, :w]
    noise = np.random.default_rng(7).standard_normal((h, w))

    def smooth(sigma: float) -> np.ndarray:
        blurred = ndimage.gaussian_filter(noise, sigma, mode="wrap")
        return blurred / blurred.std()

    if material == "brick":
        out = (y % 8 >= 6) | ((x + 8 * (y // 8 % 2)) % 16 >= 14)
    elif material == "planks":
        out = np.where(y % 12 < 2, 0.0, 0.85 + 0.15 * np.sin(x / 9.0 + 2.0 * (y // 12)))
    elif material == "tiles":
        out = (y % 12 >= 10) | (x % 12 >= 10)
    elif material == "leaves":
        out = 1 / (1 + np.exp(-3 * smooth(2.2)))
    elif material == "clouds":
        out = 1 / (1 + np.exp(-1.5 * smooth(6.0)))
    else:
        out = 0.5 + 0.2 * smooth(4.0)
    return ndimage.gaussian_filter(np.clip(out, 0, 1).astype(np.float32), 0.6)


@functools.cache
def _wall(material: str, tint: int) -> np.ndarray:
    """A material in one tint, float32 (HEIGHT + PHASE, WIDTH + PHASE, 3). A scene shows a part of it."""
    ends = np.array(RANGES[material], np.float32)
    dark, light = ends[0] + (ends[1] - ends[0]) * (tint / (TINTS - 1))
    return pattern(material)[:, :, None] * (light - dark) + dark


def text_box(scene: Scene) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the letters' cells in pixels."""
    left, top = LEFT + PITCH * scene.column, HEIGHT // 2 - CELL_HEIGHT // 2 + scene.dy
    return left, top, left + PITCH * len(scene.text), top + CELL_HEIGHT


def sign_cover(shape: str, dy: int) -> np.ndarray:
    """How much of each pixel a sign covers, float32 (HEIGHT, WIDTH)."""
    top = max(HEIGHTS) - dy
    return sign_mask(shape)[top : top + HEIGHT]


def render(scene: Scene) -> np.ndarray:
    """Draw one scene: uint8 (HEIGHT, WIDTH, 3)."""
    if not 1 <= len(scene.text) <= COLUMNS - scene.column:
        room = COLUMNS - scene.column
        raise ValueError(f"1 to {room} letters fit at column {scene.column}, got {scene.text!r}")
    down, right = scene.phase
    picture = _wall(scene.material, scene.tint)[down : down + HEIGHT, right : right + WIDTH].copy()
    reach = slice(EDGE, HEIGHT - EDGE)
    mask = sign_cover(scene.shape, scene.dy)[reach, :, None]
    picture[reach] += (np.array(SIGNS[scene.sign], np.float32) - picture[reach]) * mask
    letters = atlas(scene.typeface)[[LETTERS.index(c) for c in scene.text]]
    strip = letters.transpose(1, 0, 2).reshape(CELL_HEIGHT, -1)[:, :, None]
    x0, y0, x1, y1 = text_box(scene)
    cell = picture[y0:y1, x0:x1]
    cell += (np.array(INKS[scene.ink], np.float32) - cell) * strip
    return np.rint(picture).astype(np.uint8)


# --- captions --------------------------------------------------------------------------------------------------

#: Beginnings of captions that name no factor.
LEADS = (
    "Text",
    "The word",
    "It says",
    "A picture of",
    "Here is the word",
    "A picture that says",
    "This is a picture that says",
)
SHORT_LEADS = ("the word", "the text", "it says")
MOST_BEFORE = 6  #: largest number of words before the quoted text
TOKENS = 24  #: largest number of tokens of a caption: its words, letters and marks, and one token at each end

#: Prompts of the experiments. ``{a}`` is the article of the sign's colour.
NAMED = '{a} {sign} {shape} against {material} says "{text}" in {typeface} {ink} letters.'
OPEN = 'The word "{text}".'
FACTORS = ("ink", "typeface", "sign", "shape", "material")


def article(word: str) -> str:
    """``an`` before a vowel, else ``a``."""
    return "an" if word[0] in "aeiou" else "a"


def prompt(text: str, template: str = NAMED, **factors: str) -> str:
    """Fill a template with a text and factors (ink, typeface, sign, shape, material)."""
    filled = {"a": article(factors["sign"]).capitalize()} if "sign" in factors else {}
    return template.format(text=text, **filled, **factors)


def sentence(text: str, rng: random.Random, **factors: str) -> str:
    """A caption that names only the given factors, with 0 to 6 words before the text.

    ``factors`` are any of ink, typeface, material, and sign together with shape. In half of the captions the text
    comes first.
    """
    parts = []
    if "ink" in factors or "typeface" in factors:
        words = [factors[k] for k in ("typeface", "ink") if k in factors]
        parts.append(" ".join(["in", *words, "letters"]))
    if "sign" in factors:
        sign = f"{article(factors['sign'])} {factors['sign']} {factors['shape']}"
        parts.append(f"on {sign}")
    if "material" in factors:
        parts.append(f"against {factors['material']}")
    rng.shuffle(parts)
    before: list[str] = []
    if rng.random() < 0.5:
        taken = [p for p in parts if rng.random() < 0.6]
        while sum(len(p.split()) for p in taken) > MOST_BEFORE:
            taken.pop()
        lead = rng.choice(SHORT_LEADS if taken else LEADS)
        size = sum(len(p.split()) for p in taken)
        signed = taken and taken[0].startswith("on ")
        if signed and len(taken) == 1 + any(p.startswith("against") for p in taken) and rng.random() < 0.5:
            # "A blue plate against brick says": the sign as the subject.
            before = [taken[0].removeprefix("on "), *taken[1:], "says"]
        elif size + len(lead.split()) <= MOST_BEFORE:
            before = [*taken, lead]
        else:
            before = taken
        parts = [p for p in parts if p not in taken]
        # If many factors are named after the text, there is less room for a long beginning.
        if not taken and 2 + len(text) + 3 + len(lead.split()) + len(" ".join(parts).split()) > TOKENS:
            before = ["Text"]
    start = " ".join(before)
    start = start[:1].upper() + start[1:]
    return " ".join([*filter(None, [start]), f'"{text}"', *parts]) + "."


def caption(scene: Scene, rng: random.Random, world: World = SECOND) -> str:
    """A random caption of a scene. It names each factor with the probability that the world gives."""
    known = {k for k in ("ink", "typeface", "sign", "material") if rng.random() < world.named[k]}
    if "sign" in known:
        known.add("shape")
    return sentence(scene.text, rng, **{k: getattr(scene, k) for k in FACTORS if k in known})


def vocabulary() -> list[str]:
    """Every word and mark of the captions outside the quotes, in small letters and in a fixed order."""
    texts = [*LEADS, *SHORT_LEADS, "in on against says letters a an", *SIGNS, *INKS, *TYPEFACES, *SHAPES, *MATERIALS]
    return sorted({w for t in texts for w in t.lower().split()}) + ['"', ".", ","]


# --- scenes ----------------------------------------------------------------------------------------------------


def random_scene(rng: random.Random, world: World = SECOND, *, text: str | None = None, runs: bool = False) -> Scene:
    """A training scene: half of the texts are training words, and half are random strings. Factors are the world's.

    With ``runs``, the text has letters in runs (AAAA, AABB, AAABBB). Such a text looks the same everywhere. So a model
    can draw it before it has learned the position of each letter, and it learns the shapes of the letters first. A
    given ``text`` is used unchanged.
    """
    if text is None:
        length = rng.choice(LENGTHS)
        if runs:
            text = run(rng, length)
        elif rng.random() < 0.5:
            text = rng.choice(_training_words()[length])
        else:
            text = prompts.random_string(rng, length)
    material = rng.choice(world.materials)
    own = OWN[text[0]]
    if own in world.materials:
        others = [m for m in world.materials if m != own]
        material = own if not others or rng.random() < world.pull else rng.choice(others)
    sign = rng.choice(tuple(SIGNS))
    return Scene(
        text=text,
        ink=rng.choice(READABLE[sign]),
        typeface=rng.choice(world.typefaces),
        sign=sign,
        shape=rng.choice(world.shapes),
        material=material,
        column=rng.randrange(COLUMNS - len(text) + 1) if world.free_columns else 0,
        dy=rng.choice(HEIGHTS),
        tint=rng.randrange(TINTS),
        phase=(rng.randrange(PHASE), rng.randrange(PHASE)),
    )


def is_easy(scene: Scene) -> bool:
    """Whether a scene is easy, for the first part of a training: one typeface, black or white ink, first columns."""
    return scene.typeface == "plain" and scene.ink in ("black", "white") and scene.column == 0


def run(rng: random.Random, length: int) -> str:
    """A text of this length with one, two or three letters in runs. Half of the texts have only one letter."""
    parts = rng.choice([1, 1, *(n for n in (2, 3) if n < length)])
    size = -(-length // parts)
    return "".join(letter * size for letter in rng.choices(LETTERS, k=parts))[:length]


@functools.cache
def _training_words() -> dict[int, list[str]]:
    return {n: [w for w in prompts.words("train") if len(w) == n] for n in LENGTHS}


def quoted(caption: str) -> str:
    """The quoted text of a caption."""
    return re.findall(r'"([A-Z]*)"', caption)[0]
