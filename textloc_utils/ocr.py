"""Read the text in pictures, and find its position.

There are two readers. **Tesseract** reads the pictures of miniatures, and larger pictures if RapidOCR is not installed.
**RapidOCR** (``pip install 'textloc-utils[ocr]'``: PP-OCRv6 detection and recognition, offline) reads larger pictures
if it is installed. It also knows accents and other scripts, and it does not find text in photographs without text.

Tesseract reads many pictures in one run, through pytesseract and a list file of image paths. It reads dark letters on
white far better than a small word in a scene, so the text is cut out first. In a miniature's picture this takes four
steps. The colour of the sign is the median of the picture's middle. The colour of the ink is the one in the middle that
differs most from it. Each pixel becomes its share of ink. At last two kinds of parts are removed. Parts that touch the
edge of the picture are the wall (letters may touch the right edge). Parts that the sign's colour does not surround are
other things, such as a brick. In larger pictures ``textlines`` finds the letters. No step knows the wanted text, the
colours, or the position of the letters.
"""

import contextlib
import functools
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytesseract
from PIL import Image, ImageFilter
from scipy import ndimage

from textloc_utils import files, textlines
from textloc_utils.prompts import LETTERS
from textloc_utils.settings import TextlocError

INSTALL = (
    "install it with `apt-get install tesseract-ocr` (Debian, Ubuntu), `brew install tesseract` (macOS) "
    "or `conda install -c conda-forge tesseract`"
)
#: Pictures up to this height are from miniatures, with one sign in the middle. Taller pictures have text anywhere.
MINIATURE_HEIGHT = 128
#: If ink and sign are closer than this (Euclidean, 0..255 RGB), they count as one surface without text.
MIN_CONTRAST = 40.0
#: At least this share of a letter's surroundings must be closer than NEAR to the sign's colour (Euclidean RGB, at most
#: half the contrast). A brick or a tile has more wall around it.
SURROUNDED, NEAR = 0.7, 70.0
#: Tesseract's page segmentation modes: a block of lines, a line, and a word (used if no line was read).
BLOCK, LINE, WORD = 6, 7, 8
#: Pages per run of Tesseract.
BATCH = 100
#: The characters that Tesseract may read in pictures above MINIATURE_HEIGHT.
CHARACTERS = LETTERS + LETTERS.lower() + "0123456789%&"
#: Characters that no comparison of texts counts. So it does not matter if a reader leaves them out.
MARKS = frozenset(".,:;!?'\u2019()/+#*-\u2013$\u20ac@ \n\t")
ENGINES = ("auto", "tesseract", "rapidocr")
#: A line of RapidOCR with a lower score counts as not read. This is RapidOCR's own default.
LEAST_SCORE = 0.5
#: Width of the margin around text that counts as text, as a share of the picture's height. It allows for blur and for
#: errors in the reader's boxes.
ROOM = 0.02


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The result of a reader for one picture.

    ``text`` holds the lines, with their spaces. It is empty if no text was found (then there are no ``boxes``), or if
    text was found but not read (then there are boxes). ``boxes`` are (left, top, right, bottom) in pixels. ``reader``
    is the name and version of the reader.
    """

    text: str
    boxes: tuple[tuple[int, int, int, int], ...]
    reader: str

    @property
    def found(self) -> bool:
        """Whether there is text in the picture, even if it could not be read."""
        return bool(self.boxes)

    @property
    def joined(self) -> str:
        """The text in capitals without spaces and line breaks."""
        return "".join(self.text.upper().split())

    def __str__(self) -> str:
        return " ".join(self.text.split()) or ("(text found, not read)" if self.found else "(no text found)")


def read(images: Sequence | np.ndarray, *, engine: str = "auto") -> list[str]:
    """Read the text of each picture as one string of capitals.

    Parameters
    ----------
    images
        Sequence of uint8 arrays (H, W, 3) or PIL images, or one array (n, H, W, 3).
    engine
        The reader, see :func:`engine_of`.

    Returns
    -------
    One string per picture, in order. It is ``""`` if nothing was read (:func:`readings` says why). Spaces and line
    breaks are left out, so several words come back as one string. Pictures up to 128 pixels high give only capitals.
    Taller pictures also give digits, and all other characters that their reader knows.

    Notes
    -----
    Pictures up to 128 pixels high are read as one line. They are cut out (see the module), scaled (at 64 rows by 4
    vertically and 3.6 horizontally, bicubic) and sharpened. If nothing is read in a line, it is read again as a word.
    Tesseract's dictionaries are off. Of 336 rendered scenes, Tesseract 5.3.0 read .997 to 1.000 exactly, also if they
    were blurred, noisy, or passed through an autoencoder. Of 336 scenes with random strings of 3 to 6 letters it read
    .943 to .976. Without cutting out, the values are .690 to .735 and .280 to .354. Nearly all confusions are J with I
    or JI, I with T or L, and Q with O.

    Of 300 rendered signs with one or two lines at 256, 512 and 1024 pixels, Tesseract read .973, .947 and .977 exactly.
    RapidOCR 3.10.0 read all of them (``tests/benchmarks/test_sign_reading.py``).

    Raises
    ------
    TextlocError
        A reader is missing or fails, a picture is not uint8 RGB, or the engine is unknown.
    """
    return [reading.joined for reading in readings(images, engine=engine)]


def readings(images: Sequence | np.ndarray, *, engine: str = "auto") -> list[Reading]:
    """Read the text of each picture as written, and find its boxes. Arguments and errors are as in :func:`read`."""
    pictures = [_rgb(image) for image in images]
    out: dict[int, Reading] = {}
    by_reader: dict[Callable, list[int]] = {}
    for i, picture in enumerate(pictures):
        height = picture.shape[0]
        tesseract = _miniatures if height <= MINIATURE_HEIGHT else _signs
        how = _rapid if engine_of(height, engine) == "rapidocr" else tesseract
        by_reader.setdefault(how, []).append(i)
    for how, mine in by_reader.items():
        out |= zip(mine, how([pictures[i] for i in mine]), strict=True)
    return [out[i] for i in range(len(pictures))]


def engine_of(height: int, engine: str = "auto") -> str:
    """The reader for pictures of this height in pixels, ``tesseract`` or ``rapidocr``.

    ``auto`` means Tesseract for pictures up to 128 pixels high. For taller pictures it means RapidOCR if it is
    installed, and Tesseract otherwise. Raises TextlocError for an unknown reader, and for RapidOCR if it is requested
    but not installed.
    """
    if engine not in ENGINES:
        raise TextlocError(f"unknown reader {engine!r}; allowed: {', '.join(ENGINES)}")
    if engine == "rapidocr":
        reader(engine)
    if engine != "auto":
        return engine
    return "rapidocr" if height > MINIATURE_HEIGHT and _rapid_version() else "tesseract"


def reader(engine: str) -> str:
    """Name and version of a reader, such as ``tesseract 5.3.0``. Raises TextlocError if it is not installed."""
    if engine == "tesseract":
        return f"tesseract {tesseract_version()}"
    if not (version := _rapid_version()):
        raise TextlocError("RapidOCR is not installed; install it with `pip install 'textloc-utils[ocr]'`")
    return f"rapidocr {version}"


def check_reader(height: int, texts: Sequence[str] = (), engine: str = "auto") -> str:
    """Name and version of the reader for pictures of this height. Call this before drawing, which may take minutes.

    Raises TextlocError if the reader is not installed, or if it cannot read one of the texts, because a correct picture
    would then count as wrong.
    """
    chosen = engine_of(height, engine)
    name = reader(chosen)
    miniature = height <= MINIATURE_HEIGHT
    known = set(_rapid_characters() if chosen == "rapidocr" else LETTERS if miniature else CHARACTERS)
    for text in texts:
        for character in text:
            if character in MARKS or character in known or character.upper() in known:
                continue
            hint = "; `pip install 'textloc-utils[ocr]'` adds one that reads more" if chosen == "tesseract" else ""
            raise TextlocError(f"{name} cannot read {character!r}, so it cannot check whether {text!r} was drawn{hint}")
    return name


def outside_text(found: Sequence[Reading], height: int, width: int) -> np.ndarray:
    """Boolean (height, width), True outside the text of all these readings of pictures of that size.

    If text covers the whole picture, the mask is True everywhere, because there is nothing else to compare.
    """
    mask, room = np.ones((height, width), bool), round(ROOM * height)
    for left, top, right, bottom in (box for reading in found for box in reading.boxes):
        mask[max(0, top - room) : bottom + room, max(0, left - room) : right + room] = False
    return mask if mask.any() else ~mask


def outside(pictures: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Boolean, True outside the text of the pictures (n, H, W, 3) and of the source (H, W, 3).

    A reader finds the text in the source and in each picture. The result is (n, H, W). In pictures up to 128 pixels
    high, no text is searched: the result is (H, W), True everywhere.
    """
    height, width = source.shape[:2]
    if height <= MINIATURE_HEIGHT:
        return np.ones((height, width), bool)
    first, *others = readings([source, *pictures])
    return np.stack([outside_text([first, each], height, width) for each in others])


# --- Tesseract --------------------------------------------------------------------------------------------------


def _miniatures(pictures: list[np.ndarray]) -> list[Reading]:
    name = reader("tesseract")
    cut = [cut_out(picture) for picture in pictures]
    texts = [""] * len(pictures)
    for mode in (LINE, WORD):
        todo = [(i, page) for i, (page, _) in enumerate(cut) if page is not None and not texts[i]]
        for i, text in _in_batches(todo, mode, LETTERS):
            texts[i] = "".join(c for c in text.upper() if c in LETTERS)
    return [
        Reading(text=text, boxes=() if box is None else (box,), reader=name)
        for text, (_, box) in zip(texts, cut, strict=True)
    ]


def _signs(pictures: list[np.ndarray]) -> list[Reading]:
    """Read each block of lines separately. Blocks in which nothing was read are tried again with other modes."""
    name = reader("tesseract")
    blocks = [(i, block) for i, picture in enumerate(pictures) for block in textlines.find(picture)]
    texts = [""] * len(blocks)
    for mode in (LINE, BLOCK, WORD):
        todo = [
            (at, block.page)
            for at, (_, block) in enumerate(blocks)
            if not texts[at] and (mode != LINE or block.lines == 1)
        ]
        for at, text in _in_batches(todo, mode, CHARACTERS):
            texts[at] = "\n".join(line for line in (" ".join(row.split()) for row in text.splitlines()) if line)
    out = []
    for i in range(len(pictures)):
        # Two shapes next to each other in which nothing can be read are not text.
        mine = [(b.box, texts[at]) for at, (of, b) in enumerate(blocks) if of == i and (texts[at] or b.letters > 2)]
        boxes = tuple(box for box, _ in mine)
        out.append(Reading(text="\n".join(text for _, text in mine if text), boxes=boxes, reader=name))
    return out


def _in_batches(pages: list[tuple[int, Image.Image]], mode: int, letters: str) -> Iterator[tuple[int, str]]:
    for start in range(0, len(pages), BATCH):
        chunk = pages[start : start + BATCH]
        for (i, _), text in zip(chunk, _tesseract([page for _, page in chunk], mode, letters), strict=True):
            yield i, text


def tesseract_version() -> str:
    """Version of the installed Tesseract, such as ``5.3.0``. Raises TextlocError if it is not installed."""
    try:
        with _explained():
            return str(pytesseract.get_tesseract_version())
    except SystemExit:  # pytesseract exits if it does not know the version
        raise TextlocError(f"this program named tesseract is too old or is not Tesseract; {INSTALL}") from None


def cut_out(picture: np.ndarray) -> tuple[Image.Image | None, tuple[int, int, int, int] | None]:
    """Cut the text out of a miniature's picture, uint8 (H, W, 3): a grey page for Tesseract, and the text's box.

    Both are None if there is no text.
    """
    ink = _ink(picture)
    if ink is None:
        return None, None
    solid = ink > 0.5
    rows, columns = (np.flatnonzero(solid.sum(axis) >= 2) for axis in (1, 0))
    if not len(rows) or not len(columns):
        return None, None
    height = picture.shape[0]
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    line = np.pad(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], max(height // 16, 1))
    page = Image.fromarray(np.rint(255 * (1 - line)).astype(np.uint8))
    scale = 256 / height
    # The page is made slightly narrower, so this wide monospace typeface looks more like those of Tesseract's training.
    page = page.resize((round(page.width * scale * 0.9), round(page.height * scale)), Image.Resampling.BICUBIC)
    return page.filter(ImageFilter.UnsharpMask(3, 120, 0)), box


def _ink(picture: np.ndarray) -> np.ndarray | None:
    """Share of ink in each pixel, (H, W) in 0..1, zero on the wall. None if the middle has only one colour.

    The share is measured along the line from the sign's colour to the ink's colour. So an ink that differs from its
    sign in hue more than in luminance becomes as dark as any other ink.
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
    # The right edge is not used, because the last letter on a banner may touch it. The wall also touches other edges.
    edge = np.unique(np.concatenate([parts[0], parts[-1], parts[:, 0]]))
    sizes = np.bincount(parts.ravel(), minlength=n + 1)
    ground = np.linalg.norm(x - sign, axis=2) < min(NEAR, contrast / 2)
    kept = []
    for part in np.setdiff1d(np.flatnonzero(sizes >= 5), np.append(edge, 0)):
        near = ndimage.binary_dilation(parts == part, np.ones((3, 3)))  # blurred into the sign
        ring = ndimage.binary_dilation(near, np.ones((3, 3))) & ~near & (parts == 0)
        kept += [part] if ring.any() and ground[ring].mean() >= SURROUNDED else []
    letters = np.isin(parts, kept)
    return np.where(ndimage.binary_dilation(letters, np.ones((3, 3))), ink, 0.0)


def _rgb(image) -> np.ndarray:
    picture = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        raise TextlocError(f"a picture must be uint8 (H, W, 3), got {picture.dtype} {picture.shape}")
    return picture


def _config(mode: int, letters: str) -> str:
    return f"--psm {mode} --oem 1 -c tessedit_char_whitelist={letters} -c load_system_dawg=0 -c load_freq_dawg=0"


def _tesseract(pages: list[Image.Image], mode: int, letters: str) -> list[str]:
    """Read all pages in one call of Tesseract. Returns the text of each page, with its line breaks."""
    # image_to_string is not used, because a killed process would leave some of its files behind.
    with files.scratch() as folder, _one_thread(), _explained():
        paths = [folder / f"{i}.png" for i in range(len(pages))]
        for page, path in zip(pages, paths, strict=True):
            page.save(path, compress_level=1)
        (folder / "pages").write_text("\n".join(map(str, paths)) + "\n")
        pytesseract.pytesseract.run_tesseract(
            str(folder / "pages"), str(folder / "read"), "txt", lang="eng", config=_config(mode, letters)
        )
        output = (folder / "read.txt").read_bytes().decode()
    texts = output.split("\f")
    # Some versions write a form feed between pages, others after each page.
    if len(texts) == len(pages) + 1 and not texts[-1].strip():
        texts.pop()
    if len(texts) != len(pages):
        raise TextlocError(f"tesseract returned {len(texts)} pages for {len(pages)} pictures")
    return texts


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Limit Tesseract to one thread: more threads slow it down on small pages. Its process gets this environment."""
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


# --- RapidOCR ---------------------------------------------------------------------------------------------------


@functools.cache
def _rapid_version() -> str | None:
    """Version of the installed RapidOCR. None if RapidOCR or onnxruntime, which it needs, is not installed."""
    try:
        importlib.metadata.version("onnxruntime")
        return importlib.metadata.version("rapidocr")
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _rapid_engine():
    reader("rapidocr")
    from rapidocr import RapidOCR

    threads = "EngineConfig.onnxruntime.{}_op_num_threads"
    # One thread gives the same sums on every machine. Signs are upright, so no text is rotated.
    return RapidOCR(
        params={
            "Global.log_level": "critical",
            "Global.use_cls": False,
            "Global.text_score": 0.0,  # lines below LEAST_SCORE also count as text
            threads.format("intra"): 1,
            threads.format("inter"): 1,
        }
    )


@functools.cache
def _rapid_characters() -> frozenset[str]:
    engine = _rapid_engine()
    engine(np.zeros((32, 32, 3), np.uint8), use_det=False, use_cls=False, use_rec=True)  # loads the recognizer
    return frozenset(engine.text_rec.session.get_character_list())


def _rapid(pictures: list[np.ndarray]) -> list[Reading]:
    name, engine, out = reader("rapidocr"), _rapid_engine(), []
    for picture in pictures:
        bgr = np.ascontiguousarray(picture[:, :, ::-1])
        found = engine(bgr, use_det=True, use_cls=False, use_rec=True)
        if not found.txts:  # RapidOCR drops the boxes of lines in which it reads nothing
            found = engine(bgr, use_det=True, use_cls=False, use_rec=False)
        corners = np.zeros((0, 4, 2)) if found.boxes is None else np.asarray(found.boxes)
        boxes = [(*np.floor(c.min(0)).astype(int).tolist(), *np.ceil(c.max(0)).astype(int).tolist()) for c in corners]
        texts = getattr(found, "txts", None) or [""] * len(boxes)
        scores = found.scores if getattr(found, "txts", None) else [0.0] * len(boxes)
        kept = [(b, t.strip() if s >= LEAST_SCORE else "") for b, t, s in zip(boxes, texts, scores, strict=True)]
        # RapidOCR also finds text in textures. A box without read text is kept only if textlines finds letters there.
        if not all(text for _, text in kept):
            seen = [block.box for block in textlines.find(picture)]
            kept = [(box, text) for box, text in kept if text or any(_meet(box, other) for other in seen)]
        lines = _in_lines(kept)
        text = "\n".join(line for line in (" ".join(t for _, t in parts if t) for parts in lines) if line)
        out.append(Reading(text=text, boxes=tuple(b for parts in lines for b, _ in parts), reader=name))
    return out


def _meet(box: tuple, other: tuple) -> bool:
    return all(max(box[i], other[i]) < min(box[i + 2], other[i + 2]) for i in (0, 1))


def _in_lines(parts: list[tuple]) -> list[list[tuple]]:
    """Sort boxes and their texts into lines, in reading order. Boxes next to each other are one line."""
    lines: list[list[tuple]] = []
    for part in sorted(parts, key=lambda part: part[0][1] + part[0][3]):
        top, bottom = part[0][1], part[0][3]
        for line in lines:
            shared = min(bottom, line[-1][0][3]) - max(top, line[-1][0][1])
            if shared > 0.5 * min(bottom - top, line[-1][0][3] - line[-1][0][1]):
                line.append(part)
                break
        else:
            lines.append([part])
    return [sorted(line, key=lambda part: part[0][0]) for line in lines]
