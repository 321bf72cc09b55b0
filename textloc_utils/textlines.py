"""Find text in a picture of any size, and return it as black ink on white paper.

A letter is a connected piece that differs from its surroundings, is in a row with other pieces of similar height, and
does not touch the edge of the picture. Dark and light pieces are searched in luminance and in each colour channel. The
channel with the strongest rows is used. Text differs from textures in two ways: it is ink of one tone on paper of one
tone, and its pieces differ from each other. Nothing here knows the wanted text or the colours.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.sparse.csgraph import connected_components

#: Letters are searched in a copy of the picture with this height, in pixels. Colours come from the picture itself.
WORKING = 512
#: Smallest and largest height of a letter, as shares of the picture's height, and its smallest difference from its
#: surroundings, 0 to 255.
LEAST, MOST, CONTRAST = 0.02, 0.6, 18.0
#: Limits for ink on paper. TWO_TONES is the smallest share of the variance that is between two tones (Otsu). UNEVEN is
#: the largest spread of the paper's tone, and COLOURED is the largest spread of colours that are not between paper and
#: ink. Both are shares of the distance from paper to ink. For rendered signs with noise and blur, the worst values are
#: 0.78, 0.18 and 0.25. For surfaces with normally distributed tones, the share of the variance is 0.64.
TWO_TONES, UNEVEN, COLOURED = 0.75, 0.2, 0.5
#: Three or more pieces are a pattern if the relative spread of their sizes is below ALIKE and they fill more than SOLID
#: of their boxes.
ALIKE, SOLID = 0.03, 0.6
#: Height of the letters on the page for a reader, in pixels.
LETTER = 40


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """Lines of text, one below the other.

    ``box`` is (left, top, right, bottom) in the picture's pixels. ``lines`` is the number of lines, and ``letters`` is
    the number of pieces that look like letters. ``page`` is the text as a grey picture, black on white. Its letters are
    about ``LETTER`` pixels high.
    """

    box: tuple[int, int, int, int]
    lines: int
    letters: int
    page: Image.Image


def find(picture: np.ndarray) -> list[Block]:
    """The blocks of text in a uint8 picture (H, W, 3), from top to bottom. Empty if nothing looks like text."""
    ratio = WORKING / picture.shape[0]
    small = Image.fromarray(picture).resize((max(1, round(picture.shape[1] * ratio)), WORKING), Image.Resampling.BOX)
    x = ndimage.gaussian_filter(np.asarray(small, np.float64), (1.2, 1.2, 0))
    channels = [x @ (0.299, 0.587, 0.114), *np.moveaxis(x, 2, 0)]
    best, lines = 0.0, []
    for channel in channels:
        for sign in (1.0, -1.0):
            found = _lines(sign * channel)
            # Luminance comes first. A colour channel is used only if it is clearly better.
            if (score := sum(line.score for line in found)) > 1.1 * best:
                best, lines = score, found
    blocks = [_block(picture, block, 1 / ratio) for block in _stacked(lines)]
    blocks = [b for b in blocks if _in_two_tones(picture, b)]
    blocks = [b for b in blocks if not any(_within(b.box, o.box) for o in blocks if o is not b and o.lines >= b.lines)]
    return sorted(blocks, key=lambda block: block.box[1])


@dataclass(frozen=True, kw_only=True)
class _Line:
    box: tuple[float, float, float, float]
    height: float  # height of its letters
    letters: int
    score: float


def _lines(channel: np.ndarray) -> list[_Line]:
    """Rows of letters that are darker than their surroundings in a channel (H, W)."""
    height, width = channel.shape
    best: list[_Line] = []
    for window in (height // 16, height // 5):
        low = ndimage.uniform_filter(channel, window) - channel
        dark = low > max(CONTRAST / 2, 0.25 * np.percentile(low, 99.5))
        parts, _ = ndimage.label(dark, np.ones((3, 3)))
        found = []
        for i, (rows, columns) in enumerate(ndimage.find_objects(parts), 1):
            h, w = rows.stop - rows.start, columns.stop - columns.start
            if not LEAST * height <= h <= MOST * height or w > 3 * h or w > 0.5 * width:
                continue
            if not rows.start or not columns.start or rows.stop == height or columns.stop == width:
                continue
            here = parts[rows, columns] == i
            if here.mean() < 0.08:
                continue
            contrast = float(low[rows, columns][here].mean())
            found.append((columns.start, rows.start, columns.stop, rows.stop, contrast, here.sum()))
        lines = _rows(found)
        if sum(line.score for line in lines) > sum(line.score for line in best):
            best = lines
    return best


def _rows(letters: list[tuple]) -> list[_Line]:
    """Join letters of similar height that are next to each other into rows."""
    beside = np.zeros((len(letters), len(letters)), bool)
    for i, a in enumerate(letters):
        for j, b in enumerate(letters[:i]):
            h, k = a[3] - a[1], b[3] - b[1]
            apart = max(a[0], b[0]) - min(a[2], b[2])
            shared = min(a[3], b[3]) - max(a[1], b[1])
            if max(h, k) <= 2 * min(h, k) and shared > 0.5 * min(h, k) and apart < 1.6 * max(h, k):
                beside[i, j] = True
    lines, patterned = [], 0
    count, group = connected_components(beside, directed=False)
    for row in range(count):
        mine = np.array(letters)[group == row]
        if _is_pattern(mine):
            patterned += len(mine)
        elif _is_text(mine):
            heights = mine[:, 3] - mine[:, 1]
            box = (*mine[:, :2].min(0), *mine[:, 2:4].max(0))
            score = float((heights * mine[:, 4]).sum())
            lines.append(_Line(box=box, height=float(np.median(heights)), letters=len(mine), score=score))
    if patterned > sum(line.letters for line in lines):
        return []  # a surface with a pattern: the other rows are tiles, too, which are cut off or in shade
    most = max((line.score for line in lines), default=0.0)
    lines = sorted((line for line in lines if line.score > 0.15 * most), key=lambda line: -line.score)
    # A line inside a stronger line is a part of the stronger line's letters.
    return [line for i, line in enumerate(lines) if not any(_within(line.box, other.box) for other in lines[:i])]


def _is_pattern(letters: np.ndarray) -> bool:
    """Whether three or more pieces (n, 6) are copies of each other, like tiles and dots."""
    left, top, right, bottom, _, area = letters.T
    heights, widths = bottom - top, right - left
    alike = all(x.std() < ALIKE * x.mean() for x in (heights, widths, area))
    return len(letters) > 2 and alike and bool(np.mean(area / (heights * widths)) > SOLID)


def _is_text(letters: np.ndarray) -> bool:
    """Whether letters (n, 6) have a common base line, and similar heights and darkness.

    The limits are stricter for two letters, because two pieces may be next to each other by chance.
    """
    if len(letters) < 2:
        return False
    left, top, _, bottom, contrast, _ = letters.T
    heights = bottom - top
    typical = np.median(heights)
    base = np.polyfit(left, bottom, 1) if len(letters) > 2 else (0.0, bottom.mean())
    off = np.median(np.abs(bottom - np.polyval(base, left)))
    if len(letters) == 2:
        return off < 0.08 * typical and heights.max() < 1.4 * heights.min() and contrast.std() < 0.2 * contrast.mean()
    return off < 0.12 * typical and abs(base[0]) < 0.35 and contrast.std() < 0.4 * contrast.mean()


def _within(box, other) -> bool:
    """Whether more than half of a box is inside another box."""
    width, height = (min(box[i + 2], other[i + 2]) - max(box[i], other[i]) for i in (0, 1))
    return min(width, height) > 0 and width * height > 0.5 * (box[2] - box[0]) * (box[3] - box[1])


def _stacked(lines: list[_Line]) -> list[list[_Line]]:
    """Join lines of similar height that are below each other into blocks."""
    blocks: list[list[_Line]] = []
    for line in sorted(lines, key=lambda line: line.box[1]):
        for block in blocks:
            last = block[-1]
            beside = min(line.box[2], last.box[2]) - max(line.box[0], last.box[0])
            like = max(line.height, last.height) < 2 * min(line.height, last.height)
            if like and beside > 0 and line.box[1] - last.box[3] < 1.5 * line.height:
                block.append(line)
                break
        else:
            blocks.append([line])
    return blocks


def _block(picture: np.ndarray, lines: list[_Line], ratio: float) -> Block:
    boxes = np.array([line.box for line in lines]) * ratio
    letter = float(np.mean([line.height for line in lines])) * ratio
    (left, top), (right, bottom) = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    box = (int(left), int(top), int(np.ceil(right)), int(np.ceil(bottom)))
    room = 0.35 * letter  # for accents, commas and the dots of letters
    left, top = max(0, int(left - room)), max(0, int(top - room))
    right, bottom = min(picture.shape[1], int(right + room) + 1), min(picture.shape[0], int(bottom + room) + 1)
    page = _page(picture[top:bottom, left:right], letter)
    return Block(box=box, lines=len(lines), letters=sum(line.letters for line in lines), page=page)


def _in_two_tones(picture: np.ndarray, block: Block) -> bool:
    """Whether the content of a block's box looks like ink of one tone on paper of one tone."""
    left, top, right, bottom = block.box
    x, paper, direction = _paper_and_ink(picture[top:bottom, left:right], 0.8 * (bottom - top) / block.lines)
    way = max(float(direction @ direction), 1.0)
    share = (x - paper) @ direction / way
    if np.linalg.norm(x - paper - share[..., None] * direction, axis=2).std() > COLOURED * way**0.5:
        return False
    tones = np.sort(np.clip(share, -0.5, 1.5).ravel())
    n, sums = np.arange(1, len(tones)), np.cumsum(tones)
    means = sums[:-1] / n, (sums[-1] - sums[:-1]) / (len(tones) - n)
    between = n / len(tones) * (1 - n / len(tones)) * (means[0] - means[1]) ** 2
    at = int(between.argmax())
    gap = means[1][at] - means[0][at]
    return bool(between[at] > TWO_TONES * tones.var() and tones[: at + 1].std() < UNEVEN * gap)


def _paper_and_ink(crop: np.ndarray, letter: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scale a crop so that its letters are LETTER pixels high. Returns it, its paper's colour, and ink minus paper."""
    scale = LETTER / letter
    size = (max(8, round(crop.shape[1] * scale)), max(8, round(crop.shape[0] * scale)))
    reduced = Image.fromarray(crop).resize(size, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.BOX)
    x = np.asarray(reduced, np.float64)
    paper = np.median(x.reshape(-1, 3), axis=0)
    distance = np.linalg.norm(x - paper, axis=2)
    return x, paper, np.median(x[distance >= np.quantile(distance, 0.93)], axis=0) - paper


def _page(crop: np.ndarray, letter: float) -> Image.Image:
    """A crop of text in black on white, with letters LETTER pixels high. Pieces that touch its edge are removed."""
    x, paper, direction = _paper_and_ink(crop, letter)
    share = np.clip((x - paper) @ direction / max(direction @ direction, 1.0), 0, 1)
    parts, n = ndimage.label(share > 0.4)
    edge = np.unique(np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]]))
    kept = np.isin(parts, np.setdiff1d(np.arange(1, n + 1), edge))
    share = np.where(ndimage.binary_dilation(kept, np.ones((5, 5))), share, 0.0)
    return Image.fromarray(np.rint(255 * (1 - np.pad(share, LETTER // 2))).astype(np.uint8))
