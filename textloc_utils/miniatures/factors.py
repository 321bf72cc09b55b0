"""Read every factor of a miniature's picture: text, place, typeface, ink, sign, shape and material.

The readers were made only with rendered pictures, never with pictures that a model drew. Text, place and typeface come
from template matching with the letters of all typefaces. Ink and sign are the colours of the pixels there. The shape is
the outline that the sign's colour fills best. The material comes from a linear classifier of the pixels above and below
every sign. Template matching is fast and needs no other program, so a training run can read thousands of pictures. For
the spelling that the book reports, an OCR engine reads the pictures (:mod:`textloc_utils.ocr`).
"""

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from textloc_utils.miniatures import world
from textloc_utils.prompts import LETTERS

LEAST_MATCH = 0.5  #: a text needs at least this mean correlation with the best letters
SLACK = 1  #: letters are searched up to this many pixels away from their regular positions
LONGER = 0.02  #: bonus per letter; otherwise every word would be cut to its clearest letters
SHADES = 24  #: number of pixels that represent the material's colours
SPREAD = 25.0  #: if two RGB distances differ by less than this, a pixel is only partly assigned to the sign


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The factors that are read in a picture. If no text was found, text, ink and typeface are empty."""

    text: str
    ink: str
    typeface: str
    sign: str
    shape: str
    material: str
    column: int
    dy: int

    def outside_text(self, letters: int = 0) -> np.ndarray:
        """Boolean (HEIGHT, WIDTH): True outside the cells of the letters that were read.

        With ``letters``, the cells of at least this many letters are False. If no text was found, the mask is True
        everywhere.
        """
        mask = np.ones((world.HEIGHT, world.WIDTH), bool)
        if self.text:
            text = self.text.ljust(min(letters, world.COLUMNS - self.column), "A")
            left, top, right, bottom = world.text_box(world.Scene(text=text, column=self.column, dy=self.dy))
            mask[top:bottom, left:right] = False
        return mask

    def outside_sign(self) -> np.ndarray:
        """Boolean (HEIGHT, WIDTH): True for the pixels that the sign does not cover."""
        return world.sign_cover(self.shape, self.dy) == 0


@torch.no_grad()
def read(pictures: np.ndarray) -> list[Reading]:
    """Read pictures, uint8 (n, H, W, 3). Smaller pictures (of a first stage) are enlarged to a scene's size."""
    x = torch.from_numpy(np.ascontiguousarray(pictures)).float()
    if x.shape[1:3] != (world.HEIGHT, world.WIDTH):
        x = x.permute(0, 3, 1, 2)
        x = F.interpolate(x, (world.HEIGHT, world.WIDTH), mode="bicubic").clamp(0, 255).permute(0, 2, 3, 1)
    found = []
    for part in x.split(64):
        texts = _match(part)
        part = part.numpy()
        found += [_factors(picture, *text) for picture, text in zip(part, texts, strict=True)]
    return [
        Reading(**reading, material=material) for reading, material in zip(found, _materials(x.numpy()), strict=True)
    ]


def _match(x: torch.Tensor) -> list[tuple[str, str, int, int]]:
    """(text, typeface, column, dy) of each picture (n, H, W, 3), from normalised cross-correlation with all letters.

    Colours are projected on the direction of the largest colour variance in each picture's middle band.
    """
    h, w = world.CELL_HEIGHT, world.PITCH
    low, high = min(world.HEIGHTS) - SLACK, max(world.HEIGHTS) + SLACK
    top = world.HEIGHT // 2 - h // 2
    grey = principal(x)[:, None, top + low : top + high + h]
    faces = list(world.TYPEFACES)
    letters = torch.from_numpy(np.concatenate([world.atlas(f) for f in faces]))[:, None]
    letters = letters - letters.mean((2, 3), keepdim=True)
    letters = letters / letters.square().sum((2, 3), keepdim=True).sqrt()
    dot = F.conv2d(grey, letters).unflatten(1, (len(faces), 26))
    area, ones = h * w, torch.ones(1, 1, h, w)
    mean = F.conv2d(grey, ones) / area
    variance = (F.conv2d(grey.square(), ones) / area - mean.square()).clamp_min(1.0)
    # Letters are dark on a light ground, or light on a dark ground, but the same in a whole picture. So the sign of the
    # correlation is the same for all letters.
    match = dot / (variance * area).sqrt()[:, :, None]
    out, score = [("", "", 0, 0)] * len(x), np.full(len(x), LEAST_MATCH)
    for sign in (1, -1):
        best, which = (sign * match).max(2)  # (n, faces, rows, columns)
        for n in world.LENGTHS:
            for column in range(world.COLUMNS - n + 1):
                for dx in range(-SLACK, SLACK + 1):
                    at = [world.LEFT + dx + w * (column + i) for i in range(n)]
                    total = best[..., at].mean(-1) + LONGER * n  # (n, faces, rows)
                    value, place = total.flatten(1).max(1)
                    for i in np.flatnonzero(value.numpy() > score):
                        score[i] = value[i]
                        face, row = divmod(int(place[i]), total.shape[2])
                        text = "".join(LETTERS[j] for j in which[i, face, row, at])
                        dy = min(world.HEIGHTS, key=lambda d: abs(d - (row + low)))
                        out[i] = (text, faces[face], column, dy)
    return out


def principal(x: torch.Tensor) -> torch.Tensor:
    """Project pictures (n, H, W, 3) on their main colour direction in the sign's band: (n, H, W)."""
    band = x[:, world.HEIGHT // 2 - 12 : world.HEIGHT // 2 + 12, 8:-8].reshape(len(x), -1, 3)
    band = band - band.median(1, keepdim=True).values
    covariance = band.transpose(1, 2) @ band
    direction = torch.linalg.eigh(covariance).eigenvectors[:, :, -1]
    return (x * direction[:, None, None, :]).sum(-1)


def _nearest(colour: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    distance = np.linalg.norm(np.array(list(palette.values()), float) - colour, axis=1)
    return list(palette)[int(distance.argmin())]


def _factors(picture: np.ndarray, text: str, typeface: str, column: int, dy: int) -> dict:
    """All factors except the material of one picture, float (H, W, 3), given the reading of its text."""
    middle = slice(world.HEIGHT // 2 + dy - 12, world.HEIGHT // 2 + dy + 12)
    band = np.ones((world.HEIGHT, world.WIDTH), bool)
    ink = ""
    if text:
        left, top, right, bottom = world.text_box(world.Scene(text=text, column=column, dy=dy))
        letters = world.atlas(typeface)[[LETTERS.index(c) for c in text]].transpose(1, 0, 2).reshape(bottom - top, -1)
        cells = picture[top:bottom, left:right]
        ink = _nearest(np.median(cells[letters > 0.9], axis=0), world.INKS)
        band[top:bottom, left:right] = letters < 0.05
    ground = picture[middle, 8:-8][band[middle, 8:-8]]
    colour = np.median(ground, axis=0)
    uneven = np.median(np.linalg.norm(ground - colour, axis=1))
    # 1 if a pixel is closer to the sign's colour than to all colours above and below every sign, and -1 for the
    # opposite. The usual spread on the sign is subtracted. Otherwise a white wall, with its many shades, would be
    # closer to the pixels of a white sign.
    differ, covers = _outlines(dy)
    wall = np.concatenate([picture[: world.EDGE], picture[-world.EDGE :]]).reshape(-1, 3)
    shades = wall[np.linspace(0, len(wall) - 1, SHADES).astype(int)]
    pixels = picture[differ]
    distance = np.maximum(0, np.linalg.norm(pixels - colour, axis=1) - uneven)
    other = np.linalg.norm(pixels[:, None] - shades, axis=2).min(1)
    likely = np.clip((other - distance) / SPREAD, -1, 1)
    shape = world.SHAPES[int((covers @ likely).argmax())]
    sign = _nearest(colour, world.SIGNS)
    return {
        "text": text,
        "ink": ink,
        "typeface": typeface,
        "sign": sign,
        "shape": shape,
        "column": column,
        "dy": dy,
    }


@functools.cache
def _outlines(dy: int) -> tuple[np.ndarray, np.ndarray]:
    """The pixels (HEIGHT, WIDTH) at which the shapes differ, and the part of each pixel that every shape covers."""
    covers = np.stack([world.sign_cover(shape, dy) for shape in world.SHAPES])
    differ = covers.max(0) - covers.min(0) > 0.5
    return differ, covers[:, differ]


def _features(x: np.ndarray) -> np.ndarray:
    """Numbers that differ between materials, (n, 12), from the rows that no sign covers."""
    out = []
    for rows in (x[:, : world.EDGE], x[:, -world.EDGE :]):
        across, down = np.abs(np.diff(rows, axis=2)).mean((1, 2, 3)), np.abs(np.diff(rows, axis=1)).mean((1, 2, 3))
        out.append(np.column_stack([rows.mean((1, 2)), rows.std((1, 2)), across, down]))
    return np.mean(out, axis=0)


@functools.cache
def _classifier() -> tuple[np.ndarray, np.ndarray]:
    """Weights (12, materials) and offsets of a linear discriminant, fitted to 1,800 renders."""
    rng = random.Random("materials")
    known = [world.random_scene(rng, world.EVERYWHERE) for _ in range(1800)]
    x = _features(np.stack([world.render(s) for s in known]).astype(np.float32))
    labels = np.array([world.MATERIALS.index(s.material) for s in known])
    means = np.stack([x[labels == k].mean(0) for k in range(len(world.MATERIALS))])
    spread = x - means[labels]
    inverse = np.linalg.inv(spread.T @ spread / len(x) + np.eye(x.shape[1]))
    weights = inverse @ means.T
    return weights, -0.5 * (means.T * weights).sum(0)


def _materials(x: np.ndarray) -> list[str]:
    weights, offsets = _classifier()
    return [world.MATERIALS[i] for i in (_features(x) @ weights + offsets).argmax(1)]


def character_accuracy(found: str, wanted: str) -> float:
    """Share of the wanted letters that are at their position, counted from the start."""
    return sum(a == b for a, b in zip(found, wanted, strict=False)) / len(wanted)


def right(readings: Sequence[Reading], known: Sequence[world.Scene]) -> dict[str, float]:
    """How often each factor was read correctly."""
    names = ("text", *world.FACTORS, "column", "dy")
    pairs = list(zip(readings, known, strict=True))
    return {name: float(np.mean([getattr(r, name) == getattr(s, name) for r, s in pairs])) for name in names}
