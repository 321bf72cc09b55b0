"""Pictures to strings: Tesseract in batches, through pytesseract and a list file of image paths.

Tesseract reads a tight line of dark letters on white far better than a letter-sized word in a scene, so the
text line is cut out first: the sign's colour is the median of the picture's middle, the ink's colour is what
differs most from it there, every pixel becomes its share of ink, and what hangs together with the picture's
edge (the wall; letters may touch the right one) is dropped. Nothing here knows the wanted text, the colours or
where the letters stand.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytesseract
from PIL import Image, ImageFilter
from scipy import ndimage

from textloc_utils.prompts import LETTERS
from textloc_utils.settings import TextlocError

INSTALL = (
    "install it with `apt-get install tesseract-ocr` (Debian, Ubuntu), `brew install tesseract` (macOS) "
    "or `conda install -c conda-forge tesseract`"
)
#: Pictures up to this height are miniatures with one sign in the middle; taller ones are read whole.
MINIATURE_HEIGHT = 128
#: Ink and sign nearer than this (Euclidean, 0..255 RGB) count as one surface without text.
MIN_CONTRAST = 40.0
#: Tesseract's page segmentation: a line, a word where no line was found, scattered text for a whole picture.
LINE, WORD, SCATTERED = 7, 8, 11


def read(images: Sequence, *, letters: str = LETTERS, batch: int = 100) -> list[str]:
    """Read the text of each picture.

    Parameters
    ----------
    images
        Sequence of uint8 arrays (H, W, 3) or PIL images, or one array (n, H, W, 3).
    letters
        The capitals that may be read.
    batch
        Pictures per call of Tesseract.

    Returns
    -------
    One string of capitals per picture, in order; ``""`` where no text was found. Spaces and line breaks
    are left out, so several words come back as one string.

    Notes
    -----
    Pictures up to 128 pixels high are read as one line: cut out as the module says, scaled (at 64 rows x4
    upwards and x3.6 sideways, bicubic), sharpened; a line on which nothing is read gets a second try as a
    word. Tesseract's dictionaries are off. Exact matches measured with Tesseract 5.3.0 on 336 rendered 64x128
    scenes a row, over all 56 colour pairs and three shapes:

    ============================================  =====  ======  =======  ====
    pictures                                      plain  middle  word     read
    ============================================  =====  ======  =======  ====
    held-out words                                .735   .970    1.000    1.000
    the same, blurred (1 px) and noisy (12)       .720   .893    1.000    .997
    the same, blurred (1.3 px) and noisy (20)     .690   .821    .994     .997
    the same, through an autoencoder (26.6 dB)    .699   .938    .997     .997
    random strings of 3 to 6 letters              .348   .812    .955     .976
    the same, blurred (1 px) and noisy (12)       .354   .586    .920     .943
    the same, through an autoencoder (26.6 dB)    .280   .696    .908     .943
    ============================================  =====  ======  =======  ====

    *plain*: the whole picture in grey, inverted where the ink is light, page-segmentation mode 8; *middle*: the
    same without the outer 14 rows; *word*: the cut-out line, mode 8; *read*: this function. The single letters
    confused are nearly always J read as I or JI, I as T or L, Q as O. Of 560 common words with one letter
    replaced, .989 were read right and one as a word, by its lookalike letter (FJVE as FIVE); mode 8: .977, one.

    Taller pictures (full-size models) are read whole, as scattered text of large and small letters; this path is
    tested on rendered pictures only.

    Raises
    ------
    TextlocError
        Tesseract is missing or fails, a picture is not uint8 RGB, ``letters`` or ``batch`` is out of range.
    """
    if not letters or set(letters) - set(LETTERS):
        raise TextlocError(f"letters must be capitals from A to Z, got {letters!r}")
    if batch < 1:
        raise TextlocError(f"batch must be at least 1, got {batch}")
    pictures = [_rgb(image) for image in images]
    if not pictures:
        return []
    tesseract_version()
    texts = [""] * len(pictures)
    tall = [picture.shape[0] > MINIATURE_HEIGHT for picture in pictures]
    for mode in (LINE, WORD, SCATTERED):
        mine = [i for i, text in enumerate(texts) if not text and tall[i] == (mode == SCATTERED)]
        prepared = ((i, page) for i in mine if (page := preprocess(pictures[i])) is not None)
        for chunk in _chunks(prepared, batch):
            for (i, _), text in zip(chunk, _tesseract([page for _, page in chunk], mode, letters), strict=True):
                texts[i] = text
    return texts


def tesseract_version() -> str:
    """Version of the installed Tesseract, such as ``5.3.0``; TextlocError where there is none."""
    try:
        with _explained():
            return str(pytesseract.get_tesseract_version())
    except SystemExit:  # pytesseract's answer to a version it does not know
        raise TextlocError(f"this tesseract is too old or not Tesseract at all; {INSTALL}") from None


def preprocess(picture: np.ndarray) -> Image.Image | None:
    """What Tesseract gets to see of a uint8 picture (H, W, 3): a grey page, or None where there is no text."""
    if picture.shape[0] > MINIATURE_HEIGHT:
        page = Image.fromarray(picture).convert("L")
        return page.resize((page.width * 2, page.height * 2), Image.Resampling.BICUBIC) if page.height < 512 else page
    ink = _ink(picture)
    if ink is None:
        return None
    solid = ink > 0.5
    rows, columns = (np.flatnonzero(solid.sum(axis) >= 2) for axis in (1, 0))
    if not len(rows) or not len(columns):
        return None
    height = picture.shape[0]
    line = np.pad(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], max(height // 16, 1))
    page = Image.fromarray(np.rint(255 * (1 - line)).astype(np.uint8))
    scale = 256 / height
    # Slightly narrowed: this wide monospace face then reads like the faces that Tesseract was trained on.
    page = page.resize((round(page.width * scale * 0.9), round(page.height * scale)), Image.Resampling.BICUBIC)
    return page.filter(ImageFilter.UnsharpMask(3, 120, 0))


def _ink(picture: np.ndarray) -> np.ndarray | None:
    """Share of ink in each pixel, (H, W) in 0..1, zero on the wall; None where the middle shows one colour.

    Along the line from the sign's colour to the ink's, so that inks that differ from their sign in hue more
    than in luminance are as dark as any.
    """
    x = picture.astype(np.float64)
    height, width = x.shape[:2]
    middle = x[height * 5 // 16 : height * 11 // 16, width // 16 : width * 15 // 16].reshape(-1, 3)
    sign = np.median(middle, axis=0)
    distance = np.linalg.norm(middle - sign, axis=1)
    direction = np.median(middle[distance >= np.quantile(distance, 0.97)], axis=0) - sign
    contrast = np.linalg.norm(direction)
    if contrast < MIN_CONTRAST:
        return None
    ink = np.clip((x - sign) @ direction / contrast**2, 0, 1)
    parts, n = ndimage.label(ink > 0.35)
    # Not the right edge, which the last letter on a banner may touch: the wall reaches the other edges, too.
    edge = np.unique(np.concatenate([parts[0], parts[-1], parts[:, 0]]))
    sizes = np.bincount(parts.ravel(), minlength=n + 1)
    letters = np.isin(parts, np.setdiff1d(np.flatnonzero(sizes >= 5), np.append(edge, 0)))
    return np.where(ndimage.binary_dilation(letters, np.ones((3, 3))), ink, 0.0)


def _rgb(image) -> np.ndarray:
    picture = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        raise TextlocError(f"a picture must be uint8 (H, W, 3), got {picture.dtype} {picture.shape}")
    return picture


def _chunks(items: Iterator, size: int) -> Iterator[list]:
    chunk = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _config(mode: int, letters: str) -> str:
    if mode == SCATTERED:  # full-size models write small letters, too
        letters += letters.lower()
    return f"--psm {mode} --oem 1 -c tessedit_char_whitelist={letters} -c load_system_dawg=0 -c load_freq_dawg=0"


def _tesseract(pages: list[Image.Image], mode: int, letters: str) -> list[str]:
    """One call of Tesseract over all pages."""
    with tempfile.TemporaryDirectory() as folder, _one_thread(), _explained():
        paths = [Path(folder) / f"{i}.png" for i in range(len(pages))]
        for page, path in zip(pages, paths, strict=True):
            page.save(path, compress_level=1)
        listing = Path(folder) / "pages.txt"
        listing.write_text("\n".join(map(str, paths)) + "\n")
        output = pytesseract.image_to_string(str(listing), lang="eng", config=_config(mode, letters))
    texts = output.split("\f")
    # Some versions put a form feed between pages, some after each page.
    if len(texts) == len(pages) + 1 and not texts[-1].strip():
        texts.pop()
    if len(texts) != len(pages):
        raise TextlocError(f"tesseract returned {len(texts)} pages for {len(pages)} pictures")
    return ["".join(c for c in text.upper() if c in letters) for text in texts]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Tesseract's own threads slow it down on small pages; pytesseract hands this environment to its child."""
    before = os.environ.get("OMP_THREAD_LIMIT")
    os.environ["OMP_THREAD_LIMIT"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_THREAD_LIMIT"]
        else:
            os.environ["OMP_THREAD_LIMIT"] = before


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except pytesseract.TesseractNotFoundError:
        raise TextlocError(f"tesseract is not installed or not on the PATH; {INSTALL}") from None
    except pytesseract.TesseractError as error:
        reason = " ".join(str(error.message).split())
        raise TextlocError(f"tesseract failed: {reason}; if its English data is missing, {INSTALL}") from None
