"""nbval takes what notebooks record within a tolerance, all other output exactly."""

import contextlib
import copy
import math
from functools import partial

from nbval.plugin import IPyNbCell

RECORDED = "application/papermill.record/text/plain"
#: Of numbers that are no integers: absolute up to 1 (scores, shares, SSIM), relative
#: above (per cent, PSNR). Another machine's arithmetic moves a picture in a hundred;
#: the effects that the chapters tell of are five times as large.
TOLERANCE = 0.02


def alike(new: str, old: str) -> bool:
    """Whether two values, as text, are within the tolerance; of integers, equal."""
    with contextlib.suppress(ValueError):
        return int(new) == int(old)
    try:
        return math.isclose(
            float(new), float(old), rel_tol=TOLERANCE, abs_tol=TOLERANCE
        )
    except ValueError:
        return False


def pytest_itemcollected(item):
    """Have a cell compare its outputs by :func:`compared`."""
    if isinstance(item, IPyNbCell):
        item.compare_outputs = partial(compared, item.compare_outputs)


def compared(exactly, test, ref, **options) -> bool:
    """nbval's own comparison, after recorded values took the text of near ones."""
    test = copy.deepcopy(test)
    for new, old in zip(test, ref, strict=False):
        new, old = new.get("data", {}), old.get("data", {})
        if RECORDED in new and RECORDED in old and alike(new[RECORDED], old[RECORDED]):
            new[RECORDED] = old[RECORDED]
    return exactly(test, ref, **options)
