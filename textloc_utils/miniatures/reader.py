"""Read the letters of a miniature's picture by template matching with the atlas of the one typeface.

Much faster than Tesseract and without a program beside Python, so a training run can read thousands of pictures
on any machine. It only knows scenes; every figure of the book is read by Tesseract (:mod:`textloc_utils.ocr`).
"""

import numpy as np
import torch
from torch.nn import functional as F

from textloc_utils.miniatures import scenes
from textloc_utils.miniatures.factors import principal
from textloc_utils.prompts import LETTERS

LEAST_MATCH = 0.5  #: mean correlation with the best letters below which no text is found


@torch.no_grad()
def read(pictures: np.ndarray, lengths: tuple[int, ...] = (3, 4, 5, 6), slack: int = 2) -> list[str]:
    """Best word of each picture, uint8 (n, H, W, 3) to n strings; "" where no text is found.

    Pictures smaller than a scene (a first stage's) are enlarged to its size.

    Normalised cross-correlation of the picture, along its direction of largest colour variance in the middle
    band, with the 26 letters; the word's length and place (``slack`` pixels around the scenes' own) are
    the ones with the highest mean correlation.
    """
    x = torch.from_numpy(np.ascontiguousarray(pictures)).float()
    if pictures.shape[1:3] != (scenes.HEIGHT, scenes.WIDTH):
        size = (scenes.HEIGHT, scenes.WIDTH)
        x = F.interpolate(x.permute(0, 3, 1, 2), size, mode="bicubic").permute(0, 2, 3, 1)
    grey = principal(x)[:, None]
    letters = torch.from_numpy(scenes.atlas()).float()[:, None]
    letters = letters - letters.mean((2, 3), keepdim=True)
    letters = letters / letters.square().sum((2, 3), keepdim=True).sqrt()
    h, w = scenes.CELL_HEIGHT, scenes.PITCH
    area = h * w
    dot = F.conv2d(grey, letters)
    ones = torch.ones(1, 1, h, w)
    mean = F.conv2d(grey, ones) / area
    variance = (F.conv2d(grey.square(), ones) / area - mean.square()).clamp_min(1.0)
    match = (dot / (variance * area).sqrt()).abs()  # (n, 26, H - h + 1, W - w + 1); light on dark or dark on light
    best, which = match.max(1)
    top, low, high = scenes.HEIGHT // 2 - h // 2, min(scenes.HEIGHTS), max(scenes.HEIGHTS)
    out, score = [""] * len(pictures), np.full(len(pictures), LEAST_MATCH)
    for n in lengths:
        for dy in range(low - slack, high + slack + 1):
            for dx in range(-slack, slack + 1):
                columns = [scenes.LEFT + dx + i * w for i in range(n)]
                # A longer word that matches as well is preferred, or every word would end at its clearest letters.
                found = best[:, top + dy, columns].mean(1).numpy() + 0.02 * n
                for row in np.flatnonzero(found > score):
                    score[row] = found[row]
                    out[row] = "".join(LETTERS[i] for i in which[row, top + dy, columns])
    return out
