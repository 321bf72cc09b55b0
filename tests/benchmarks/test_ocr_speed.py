"""Batched reading against one pytesseract call per picture."""

import random
import time

import numpy as np
import pytesseract
import pytest

from textloc_utils import ocr, prompts
from textloc_utils.miniatures import world

PICTURES, SAMPLE = 200, 40


@pytest.mark.benchmark
def test_200_pictures_at_least_5_times_faster_than_single_calls(monkeypatch):
    """Same pictures, preprocessing, options and thread limit; the single calls on every fifth, scaled up.

    The sample is timed half before and half after the batched run, so that other load on the machine bears on
    both sides alike.
    """
    monkeypatch.setenv("OMP_THREAD_LIMIT", "1")
    rng = random.Random(0)
    pictures = np.stack([world.render(world.random_scene(rng)) for _ in range(PICTURES)])
    config = ocr._config(ocr.LINE, prompts.LETTERS)
    ocr.read(pictures[:2])  # neither side pays for the first start

    def singly(some):
        start = time.perf_counter()
        read = [pytesseract.image_to_string(ocr.cut_out(p)[0], lang="eng", config=config).strip() for p in some]
        return time.perf_counter() - start, read

    sample = pictures[:: PICTURES // SAMPLE]
    before, first = singly(sample[: SAMPLE // 2])
    start = time.perf_counter()
    batched = ocr.read(pictures)
    batched_s = time.perf_counter() - start
    after, second = singly(sample[SAMPLE // 2 :])

    alike = np.mean([a == b for a, b in zip(first + second, batched[:: PICTURES // SAMPLE], strict=True)])
    ratio = (before + after) * (PICTURES / SAMPLE) / batched_s
    print(f"\nOCR of {PICTURES} pictures: batched {batched_s:.1f} s, {ratio:.1f} times faster than single calls")
    assert alike >= 0.95
    assert ratio >= 5
