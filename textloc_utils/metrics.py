"""Scores of strings and pictures, and their means with intervals.

Text scores compare only letters and digits, and ignore case. The reader returns only capital letters, so it cannot read
the spaces and punctuation marks of the wanted text. Pictures are uint8 or float arrays with values 0..255. All
arithmetic is in float64, because differences of uint8 wrap modulo 256.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from rapidfuzz.distance import Levenshtein
from scipy import ndimage, stats
from skimage.metrics import structural_similarity

from textloc_utils.settings import TextlocError

Numbers = Sequence[float] | np.ndarray  #: values whose mean is taken
SSIM_WINDOW = 7
PSNR_CAP = 60.0  #: dB; the PSNR of two identical pictures would be infinite
RESAMPLES = 2000


# --- means with intervals -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """A mean, its 95 % interval and the number of values. It is printed as ``0.913 [0.870, 0.950], n = 200``."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{span(self.mean, self.low, self.high)}, n = {self.n}"


def span(mean: float, low: float, high: float, form: str = ".3f") -> str:
    """A mean with its interval as text, ``0.913 [0.870, 0.950]``. ``form`` is the format of each number."""
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def spans(table: pd.DataFrame, score: str = "", form: str = ".3f") -> list[str]:
    """:func:`span` of each row of a table.

    With a ``score``, its three columns from :func:`summarise` are used. Otherwise the columns are mean, low and high.
    """
    columns = [score, f"{score}_low", f"{score}_high"] if score else ["mean", "low", "high"]
    return [span(mean, low, high, form) for mean, low, high in table[columns].to_numpy()]


def resampled(values, *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Means of bootstrap samples, (resamples, ...), of values (n, ...). Whole rows are drawn, with replacement.

    The same n and seed draw the same rows. So columns that are resampled one by one still belong together.
    """
    x = np.asarray(values, dtype=np.float64)
    if len(x) == 1:  # scipy refuses a single value; all samples are equal to that value
        return np.repeat(x, resamples, axis=0)
    batch = max(1, 4_000_000 // x.size)  # limits the memory of the samples
    options = {"n_resamples": resamples, "batch": batch, "method": "percentile", "rng": np.random.default_rng(seed)}
    return np.moveaxis(stats.bootstrap((x,), np.mean, axis=0, **options).bootstrap_distribution, -1, 0)


def percentiles(values: Numbers) -> tuple[float, float]:
    """The 95 % interval of bootstrap values."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def bootstrap(values: Numbers) -> Interval:
    """Mean of numbers or booleans (n,) with its 95 % percentile-bootstrap interval.

    The same values always give the same interval. One value gives ``low == high == mean``. Raises TextlocError if there
    are no values, or if a value is not finite (NaN, or the PSNR of identical pictures).
    """
    x = _finite(values, "bootstrap")
    return Interval(float(x.mean()), *percentiles(resampled(x)), len(x))


def student(values: Numbers) -> Interval:
    """Mean of a few ``values``, such as one per training seed, with its 95 % interval from Student's t.

    One value has no spread, so ``low == high == mean``. Raises TextlocError like :func:`bootstrap`.
    """
    x = _finite(values, "Student's interval")
    half = stats.t.ppf(0.975, len(x) - 1) * stats.sem(x) if len(x) > 1 else 0.0
    return Interval(float(x.mean()), float(x.mean() - half), float(x.mean() + half), len(x))


def _finite(values: Numbers, what: str) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not len(x):
        raise TextlocError(f"{what} needs one row of at least one value, got shape {x.shape}")
    if not np.isfinite(x).all():
        raise TextlocError(
            f"{what} needs finite values, but {np.sum(~np.isfinite(x))} of {len(x)} are NaN or infinite "
            "(the psnr of identical pictures is infinite without a cap)"
        )
    return x


def rate(hits: Numbers) -> Interval:
    """Share of ``hits`` with its 95 % interval by Wilson's score (Wilson 1927).

    The bootstrap interval of a rate of 0 or 1 has no width, even with few values. So it is not used here. Raises
    TextlocError if there are no values.
    """
    x = np.asarray(hits, dtype=bool)
    if x.ndim != 1 or not len(x):
        raise TextlocError(f"a rate needs one row of at least one value, got shape {x.shape}")
    interval = stats.binomtest(int(x.sum()), len(x)).proportion_ci(method="wilson")
    return Interval(float(x.mean()), float(interval.low), float(interval.high), len(x))


def estimate(values: Numbers) -> Interval:
    """:func:`rate` of booleans, :func:`bootstrap` of numbers."""
    return (rate if np.asarray(values).dtype == bool else bootstrap)(values)


def paired_difference(a: Numbers, b: Numbers, interval: Callable[[Numbers], Interval] = bootstrap) -> Interval:
    """Mean of ``a - b`` with its ``interval``. ``a[i]`` and ``b[i]`` must belong to the same pair.

    ``interval`` is :func:`bootstrap`, or :func:`student` for few pairs, such as the training seeds of two runs.
    """
    if len(a) != len(b):
        raise TextlocError(f"paired values must have the same length, got {len(a)} and {len(b)}")
    return interval(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64))


def summarise(table: pd.DataFrame, by: Sequence[str], scores: Sequence[str]) -> pd.DataFrame:
    """One row per group of the columns ``by``, in the table's order.

    Columns: those of ``by``, n (the number of rows), and three for each score. These are its mean, under the name of
    the score, and the ends of its 95 % interval (:func:`estimate`), with ``_low`` and ``_high`` added to the name.
    """
    rows = []
    for keys, part in table.groupby(list(by), sort=False):
        row = dict(zip(by, keys, strict=True)) | {"n": len(part)}
        for score in scores:
            found = estimate(part[score])
            row |= {score: found.mean, f"{score}_low": found.low, f"{score}_high": found.high}
        rows.append(row)
    return pd.DataFrame(rows)


def summarise_groups(table: pd.DataFrame, by: Sequence[str], group: str, scores: Sequence[str]) -> pd.DataFrame:
    """Like :func:`summarise`, but with :func:`student`'s interval over the means of groups, e.g. random sets of layers.

    The column ``group`` holds the name of the group. All groups of a row must have the same size. Scores are shares, so
    the ends of an interval are limited to 0 and 1.
    """
    rows = []
    for keys, part in table.groupby(list(by), sort=False):
        row = dict(zip(by, keys, strict=True)) | {"n": len(part)}
        for score in scores:
            found = student(part.groupby(group, sort=False)[score].mean())
            row |= {score: found.mean, f"{score}_low": max(0.0, found.low), f"{score}_high": min(1.0, found.high)}
        rows.append(row)
    return pd.DataFrame(rows)


def redrawn(new: pd.DataFrame, stored: pd.DataFrame, at: Sequence[str], score: str) -> tuple[float, float]:
    """Compare rows that were drawn again with the stored rows: share of equal readings, mean difference of a score.

    The columns ``at`` identify a row. Raises TextlocError if a new row has no stored row.
    """
    both = new.merge(stored, on=list(at), suffixes=("", "_stored"))
    if len(both) != len(new):
        raise TextlocError(f"{len(new)} rows were drawn again, but only {len(both)} of them are stored")
    off = (both[score] - both[f"{score}_stored"]).abs()
    return float((both.read == both.read_stored).mean()), float(off.mean())


# --- text -----------------------------------------------------------------------------------------------------


def _normal(text: str) -> str:
    return "".join(c for c in text.upper() if c.isalnum())


def exact_match(read: str, wanted: str) -> bool:
    """Whether the picture spells the wanted text."""
    return _normal(read) == _normal(wanted)


def character_scores(read: str, wanted: str) -> tuple[float, float, float]:
    """(precision, recall, F1) of the letters of one picture, counted as multisets: the paper's text metric.

    Order does not count, so ``evol`` has the same score as ``love``. Report an edit-distance score, too. Here F1 is
    computed for each picture. The published code computes it from the mean precision and the mean recall. An empty
    reading of a text scores 0. An empty reading of an empty text scores 1.
    """
    got, want = Counter(_normal(read).lower()), Counter(_normal(wanted).lower())
    if not got and not want:
        return 1.0, 1.0, 1.0
    common = (got & want).total()
    precision = common / got.total() if got else 0.0
    recall = common / want.total() if want else 0.0
    return precision, recall, 2 * common / (got.total() + want.total())


def levenshtein(read: str, wanted: str) -> int:
    """Smallest number of letters to insert, delete or replace."""
    return Levenshtein.distance(_normal(read), _normal(wanted))


def character_error_rate(read: str, wanted: str) -> float:
    """Levenshtein distance per wanted letter. It is not capped, so a long wrong reading gives more than 1."""
    return levenshtein(read, wanted) / max(1, len(_normal(wanted)))


def text_score(read: str, wanted: str) -> float:
    """The book's text score of one picture, 0..1: 1 - Levenshtein distance / length of the longer text."""
    return Levenshtein.normalized_similarity(_normal(read), _normal(wanted))


# --- pictures -------------------------------------------------------------------------------------------------


def _pair(a, b) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.ndim not in (3, 4) or a.shape[-1] != 3:
        raise TextlocError(
            f"pictures to compare must have the same shape (H, W, 3) or (n, H, W, 3), got {a.shape} and {b.shape}"
        )
    return a.astype(np.float64), b.astype(np.float64)


def _mask(mask, shape: tuple[int, ...]) -> np.ndarray:
    """The mask, repeated for each picture of a stack, (..., H, W)."""
    mask = np.ones(shape, bool) if mask is None else np.asarray(mask)
    if mask.dtype != bool or mask.shape not in (shape, shape[-2:]):
        raise TextlocError(f"a mask must be boolean {shape[-2:]}, got {mask.dtype} {mask.shape}")
    return np.broadcast_to(mask, shape)


def _masked_mean(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean of x (..., H, W) where the mask is True, over the last two axes."""
    counted = mask.sum((-2, -1))
    if not np.all(counted):
        raise TextlocError("the mask leaves no pixel to compare")
    return np.where(mask, x, 0.0).sum((-2, -1)) / counted


def _number(x: np.ndarray):
    return float(x) if np.ndim(x) == 0 else x


def mse(a, b, mask=None):
    """Mean squared difference of two pictures, in squared grey levels.

    Parameters
    ----------
    a, b
        Pictures (H, W, 3), or stacks (n, H, W, 3), uint8 or float, values 0..255.
    mask
        Boolean (H, W), or one per picture (n, H, W). True marks the pixels that count, such as those outside the text
        box.

    Returns
    -------
    A float for a picture, or an array (n,) for a stack.
    """
    x, y = _pair(a, b)
    return _number(_masked_mean(((x - y) ** 2).mean(-1), _mask(mask, x.shape[:-1])))


def psnr(a, b, mask=None, *, cap: float | None = None):
    """Peak signal-to-noise ratio in dB (peak 255). Arguments and result are as in `mse`.

    Identical pictures give ``inf``, and a mean that includes them is ``inf``, too. A ``cap`` in dB limits each
    picture's value.
    """
    with np.errstate(divide="ignore"):
        value = 10 * np.log10(255.0**2 / np.asarray(mse(a, b, mask)))
    return _number(value if cap is None else np.minimum(value, cap))


def ssim(a, b, mask=None):
    """Structural similarity, at most 1, with uniform 7x7 windows, averaged over colours. Arguments are as in `mse`.

    Only windows that are completely inside the picture and inside the mask count. So nothing outside the mask changes
    the value. At least one window must fit into the mask.
    """
    x, y = _pair(a, b)
    mask = _mask(mask, x.shape[:-1])
    if min(x.shape[-3:-1]) < SSIM_WINDOW:
        raise TextlocError(f"ssim needs pictures of at least {SSIM_WINDOW}x{SSIM_WINDOW} pixels, got {x.shape}")
    if x.ndim == 4:
        return np.array([_ssim(*each) for each in zip(x, y, mask, strict=True)])
    return _ssim(x, y, mask)


def _ssim(x: np.ndarray, y: np.ndarray, mask: np.ndarray) -> float:
    _, values = structural_similarity(x, y, win_size=SSIM_WINDOW, data_range=255.0, channel_axis=-1, full=True)
    whole = ndimage.binary_erosion(mask, np.ones((SSIM_WINDOW, SSIM_WINDOW)), border_value=0)
    return float(_masked_mean(values.mean(-1), whole))
