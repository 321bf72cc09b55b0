"""Pictures without any text that look busy: the second world's materials, surfaces that are drawn, and photographs."""

from collections.abc import Iterator

import numpy as np
import skimage
from PIL import Image
from scipy import ndimage

from textloc_utils.miniatures import world

#: Photographs that come with scikit-image, without text.
PHOTOGRAPHS = ("brick", "grass", "gravel", "camera", "cat", "coffee", "moon", "rocket", "coins", "cell", "horse")
PHOTOGRAPHS += ("hubble_deep_field", "immunohistochemistry", "retina")


def _tinted(share: np.ndarray, dark, light) -> np.ndarray:
    """A pattern of 0 to 1 (H, W) from one colour to another."""
    x = np.asarray(dark, float) + share[..., None] * (np.asarray(light, float) - np.asarray(dark, float))
    return np.clip(np.rint(x), 0, 255).astype(np.uint8)


def _smooth(rng: np.random.Generator, size: int, sigma) -> np.ndarray:
    x = ndimage.gaussian_filter(rng.random((size, size)), sigma, mode="wrap")
    return (x - x.min()) / (x.max() - x.min())


def drawn(size: int) -> Iterator[tuple[str, np.ndarray]]:
    """Surfaces with sharp and soft edges, in regular and irregular patterns."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[:size, :size] / size
    yield "gradient", _tinted((x + y) / 2, (20, 40, 160), (250, 220, 120))
    yield "noise", rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    yield "grain", _tinted(0.5 + rng.normal(0, 0.06, (size, size)), (0, 0, 0), (255, 255, 255))
    for share in (0.004, 0.012, 0.03):
        yield f"clouds {share}", _tinted(_smooth(rng, size, share * size), (40, 90, 160), (240, 240, 250))
        spots = _smooth(rng, size, share * size) > 0.55
        yield f"spots {share}", _tinted(spots * 1.0, (30, 60, 30), (150, 200, 90))
    rings = np.sin(40 * np.hypot(x - 0.2, 0.3 * y) + 6 * _smooth(rng, size, (0.15 * size, 0.03 * size)))
    yield "wood", _tinted((rings + 1) / 2, (90, 50, 20), (190, 130, 70))
    for n in (8, 20):
        yield (
            f"checks {n}",
            _tinted(((x * n).astype(int) + (y * n).astype(int)) % 2 * 1.0, (20, 20, 20), (240, 240, 240)),
        )
        yield f"stripes {n}", _tinted((x * n).astype(int) % 2 * 1.0, (160, 30, 30), (240, 230, 220))
        shifted = x + 0.5 / n * ((y * 2 * n).astype(int) % 2)
        mortar = ((shifted * n) % 1 < 0.08) | ((y * 2 * n) % 1 < 0.16)
        yield f"bricks {n}", _tinted(mortar * 1.0, (150, 70, 50), (215, 205, 195))
        away = np.hypot((x * n) % 1 - 0.5, (y * n) % 1 - 0.5)
        yield f"dots {n}", _tinted((away < 0.3) * 1.0, (240, 240, 230), (40, 40, 120))
    windows = ((x * 12) % 1 > 0.45) & ((y * 7) % 1 > 0.35)
    yield "windows", _tinted(windows * 1.0, (170, 160, 150), (40, 50, 70))
    lights = np.zeros((size, size))
    lights[rng.integers(0, size, 300), rng.integers(0, size, 300)] = 1
    lights = ndimage.gaussian_filter(lights, 0.004 * size)
    yield "lights", _tinted(np.clip(lights / lights.max() * 1.5, 0, 1), (10, 10, 30), (255, 240, 180))


def materials(size: int) -> Iterator[tuple[str, np.ndarray]]:
    """The walls of the miniatures' second world, as large as a full-size model's pictures."""
    for material in world.MATERIALS:
        wall = np.clip(np.rint(world._wall(material, 1)), 0, 255).astype(np.uint8)
        part = Image.fromarray(wall[: world.HEIGHT, : world.HEIGHT])
        yield material, np.asarray(part.resize((size, size), Image.Resampling.BICUBIC))


def photographs(size: int) -> Iterator[tuple[str, np.ndarray]]:
    for name in PHOTOGRAPHS:
        picture = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
        side = min(picture.size)
        yield f"photograph of {name}", np.asarray(picture.crop((0, 0, side, side)).resize((size, size)))


def every(size: int) -> dict[str, np.ndarray]:
    """All of them, uint8 (size, size, 3) by name."""
    return {name: x for made in (drawn, materials, photographs) for name, x in made(size)}
