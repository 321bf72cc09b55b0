"""Signs as full-size models draw them: a wall, a framed sign, one or two lines of text, seen at an angle through a
camera with blur and noise."""

import random
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIZES = (256, 512, 1024)
FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSerif-Bold.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralBol.ttf",
)
COLOURS = {
    "red": (200, 30, 30),
    "orange": (240, 140, 20),
    "yellow": (245, 220, 60),
    "green": (30, 130, 60),
    "blue": (30, 70, 180),
    "purple": (110, 40, 140),
    "white": (240, 240, 235),
    "black": (25, 25, 25),
    "grey": (130, 130, 135),
    "brown": (110, 70, 40),
}
_COMMON = (
    "stop open hello world garden coffee market bakery music hotel station bridge summer winter ocean library museum "
    "school flower window forest island harbor planet silver golden rabbit tiger eagle dragon pizza burger salad juice "
    "lemon cherry apple orange bread cheese dinner lunch ticket camera pocket wallet jacket guitar piano violin theater"
)
_ACCENTED = "café crème brûlée señor über straße façade déjà naïve jalapeño château fiancée élan mañana schön"
WORDS, ACCENTS = _COMMON.split(), _ACCENTED.split()


@dataclass(frozen=True, kw_only=True)
class Sign:
    """A picture, uint8 (size, size, 3), the text that stands on it, and the box around it: left, top, right, bottom."""

    picture: np.ndarray
    text: str
    box: tuple[float, float, float, float]


def text(rng: random.Random) -> str:
    """One word, two words, two lines, a number, or a word with one, in capitals or with small letters."""
    kind = rng.choice(("word", "word", "word", "words", "lines", "number", "mixed"))
    word, other = rng.sample(WORDS, 2)
    written = {
        "word": word,
        "words": f"{word} {other}",
        "lines": f"{word}\n{other}",
        "number": str(rng.randint(10, 9999)),
        "mixed": rng.choice(
            (f"{word} {rng.randint(2, 99)}", f"sale {rng.randint(1, 9)}0%", f"route {rng.randint(2, 99)}")
        ),
    }[kind]
    return rng.choice((str.upper, str.upper, str.title))(written)


def draw(size: int, rng: random.Random, written: str | None = None) -> Sign:
    """One sign; colours differ by at least 90 in luminance, so that a person reads it at a glance."""
    written = text(rng) if written is None else written
    wall, sign, ink = _colours(rng)
    lines = written.split("\n")
    scale = 1024  # drawn large, then brought to its size: the same sign at every size
    page = Image.new("RGB", (scale, scale), wall)
    brush = ImageDraw.Draw(page)
    width = int(scale * rng.uniform(0.55, 0.9))
    longest = max(map(len, lines))
    font_size = int(min(width * 0.86 / (0.62 * max(longest, 3)), scale * 0.42 / len(lines)))
    name = rng.choice(FONTS)
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf", name), font_size)
    while brush.multiline_textbbox((0, 0), written, font)[2] > width * 0.88:
        font_size -= 4
        font = ImageFont.truetype(font.path, font_size)
    height = int(font_size * (1.25 * len(lines) + 0.7))
    left = rng.randint(int(scale * 0.04), int(scale * 0.96) - width)
    top = rng.randint(int(scale * 0.06), max(int(scale * 0.06), int(scale * 0.92) - height))
    frame = rng.choice((0, 0, 6, 14))
    shape = {"outline": ink if rng.random() < 0.6 else sign, "width": frame} if frame else {}
    radius = rng.choice((0, 0, 20, 50))
    brush.rounded_rectangle((left, top, left + width, top + height), radius, sign, **shape)
    if rng.random() < 0.3:  # the post or the rope that it hangs from
        post = left + width // 2
        brush.rectangle((post - 10, top + height, post + 10, scale), _mix(wall, (60, 60, 60)))
    at = (left + width // 2, top + height // 2)
    spaced = {"font": font, "align": "center", "anchor": "mm", "spacing": font_size * 0.2}
    brush.multiline_text(at, written, ink, **spaced)
    box = brush.multiline_textbbox(at, written, **spaced)
    page, box = _seen_at_an_angle(page, box, rng, wall)
    page = page.resize((size, size), Image.Resampling.LANCZOS)
    page = page.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.2) * size / 512))
    x = np.asarray(page).astype(np.float64) * np.linspace(1 - rng.uniform(0, 0.25), 1, size)[None, :, None]
    x += np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(0, 12), x.shape)
    ratio = size / scale
    return Sign(
        picture=np.clip(np.rint(x), 0, 255).astype(np.uint8), text=written, box=tuple(float(v * ratio) for v in box)
    )


def many(n: int, size: int, seed: int) -> list[Sign]:
    """``n`` signs of one size; the same seed draws the same signs at every size."""
    return [draw(size, random.Random(seed * 100_003 + i)) for i in range(n)]


def _luminance(colour) -> float:
    return float(np.dot(colour, (0.299, 0.587, 0.114)))


def _colours(rng: random.Random):
    """Wall, sign and ink: text of one luminance with its sign is art, not a sign."""
    while True:
        wall, sign, ink = rng.sample(list(COLOURS.values()), 3)
        if abs(_luminance(sign) - _luminance(ink)) >= 90:
            return wall, sign, ink


def _mix(a, b) -> tuple[int, ...]:
    return tuple((x + y) // 2 for x, y in zip(a, b, strict=True))


def _seen_at_an_angle(page: Image.Image, box, rng: random.Random, wall):
    """The page with its corners moved by up to 5 % of its side, and where the box went."""
    side = page.width
    ends = np.array([(0, 0), (side, 0), (side, side), (0, side)], float)
    starts = ends + np.array([[rng.uniform(-0.05, 0.05) * side for _ in range(2)] for _ in range(4)])
    forth, back = _homography(ends, starts), _homography(starts, ends)
    page = page.transform(page.size, Image.Transform.PERSPECTIVE, forth[:8], Image.Resampling.BICUBIC, fillcolor=wall)
    left, top, right, bottom = box
    corners = (
        np.array([(left, top, 1), (right, top, 1), (right, bottom, 1), (left, bottom, 1)])
        @ np.reshape([*back[:8], 1], (3, 3)).T
    )
    places = corners[:, :2] / corners[:, 2:]
    return page, (*places.min(0), *places.max(0))


def _homography(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The eight numbers that take ``source``'s four points (4, 2) to ``target``'s, in Pillow's order."""
    rows, values = [], []
    for (x, y), (u, v) in zip(source, target, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return np.linalg.solve(np.array(rows), np.array(values))
