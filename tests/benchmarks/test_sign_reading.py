"""Both readers on the same signs, at the sizes of full-size models: what they read, what they miss, how long."""

import importlib.util
import random
import time

import numpy as np
import pytest
import signs

from textloc_utils import metrics, ocr

PICTURES, SEED = 300, 2026
ENGINES = ["tesseract", pytest.param("rapidocr", marks=pytest.mark.skipif(
    importlib.util.find_spec("rapidocr") is None, reason="the extra [ocr] is not installed"))]  # fmt: skip


@pytest.mark.benchmark
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("size", signs.SIZES)
def test_300_signs_with_blur_noise_frames_and_perspective(size, engine):
    drawn = signs.many(PICTURES, size, SEED)
    pictures = [sign.picture for sign in drawn]
    ocr.readings(pictures[:1], engine=engine)  # not the reader's start
    began = time.perf_counter()
    read = ocr.readings(pictures, engine=engine)
    seconds = (time.perf_counter() - began) / PICTURES
    exact = np.mean([metrics.exact_match(r.text, sign.text) for r, sign in zip(read, drawn, strict=True)])
    empty = np.mean([not r.text for r in read])
    covered = np.mean([_covered(r, sign.box) for r, sign in zip(read, drawn, strict=True)])
    missed = np.mean([not r.found for r in read])
    print(
        f"\n{ocr.reader(engine)}, {size} px: exact {exact:.3f}, empty {empty:.3f}, no text found {missed:.3f}, "
        f"of the text's box found {covered:.3f}, {seconds:.2f} s per picture"
    )
    assert exact >= 0.9 and empty <= 0.02 and covered >= 0.9


@pytest.mark.benchmark
def test_accents_by_rapidocr():
    pytest.importorskip("rapidocr")
    words = [word.upper() if i % 2 else word for i, word in enumerate(signs.ACCENTS * 4)]
    drawn = [signs.draw(512, random.Random(SEED + i), word) for i, word in enumerate(words)]
    read = ocr.readings([sign.picture for sign in drawn], engine="rapidocr")
    exact = np.mean([metrics.exact_match(r.text, sign.text) for r, sign in zip(read, drawn, strict=True)])
    print(f"\n{ocr.reader('rapidocr')}: {exact:.3f} of {len(words)} words with accents")
    assert exact >= 0.85


def _covered(reading: ocr.Reading, box) -> float:
    """Share of a box that counts as text, to the pixel."""
    left, top, right, bottom = (int(v) for v in box)
    size = max(right, bottom) + 1
    return float(1 - ocr.outside_text([reading], size, size)[top:bottom, left:right].mean())
