"""The reader: measured on rendered scenes, on strings that are no words, and on pictures without text."""

import os
import random
from pathlib import Path

import matplotlib
import numpy as np
import pytesseract
import pytest
import signs
import textures
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import gaussian_filter

from textloc_utils import metrics, ocr, prompts
from textloc_utils.miniatures import world
from textloc_utils.settings import TextlocError

FACE = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / world.TYPEFACES["plain"]


def draw(texts, seed=5):
    """Scenes with these texts, and all else by chance, (n, H, W, 3)."""
    rng = random.Random(seed)
    return np.stack([world.render(world.random_scene(rng, text=text)) for text in texts])


def held_out(n, seed=5):
    rng = random.Random(seed)
    return [rng.choice(prompts.words("held-out")) for _ in range(n)]


def degrade(pictures, blur, noise, seed=0):
    soft = gaussian_filter(pictures.astype(float), (0, blur, blur, 0))
    return np.clip(soft + np.random.default_rng(seed).normal(0, noise, pictures.shape), 0, 255).astype(np.uint8)


def accuracy(read, texts):
    return np.mean([a == b for a, b in zip(read, texts, strict=True)])


@pytest.fixture(scope="module")
def words():
    texts = held_out(224)
    return draw(texts), texts


def test_clean_words_of_every_look(words):
    pictures, texts = words
    read = ocr.read(pictures)
    assert accuracy(read, texts) >= 0.99, [(t, r) for t, r in zip(texts, read, strict=True) if t != r]


def test_blurred_and_noisy_words(words):
    pictures, texts = words
    assert accuracy(ocr.read(degrade(pictures, 1.0, 12)), texts) >= 0.97


def test_random_strings():
    rng = random.Random(8)
    texts = ["KGNKUH", *(prompts.random_string(rng, rng.choice((3, 4, 5, 6))) for _ in range(111))]
    read = ocr.read(draw(texts))
    assert read[0] == "KGNKUH"
    assert accuracy(read, texts) >= 0.95, [(t, r) for t, r in zip(texts, read, strict=True) if t != r]


def test_words_with_one_wrong_letter_are_not_corrected():
    rng = random.Random(3)
    originals, texts = [], []
    while len(texts) < 112:
        word = rng.choice(prompts.words("train")[:600])
        at = rng.randrange(len(word))
        text = word[:at] + rng.choice(prompts.LETTERS.replace(word[at], "")) + word[at + 1 :]
        originals.append(word)
        texts.append(text)
    read = ocr.read(draw(texts))
    credited = [(t, r) for t, r, o in zip(texts, read, originals, strict=True) if r == o]
    assert len(credited) <= 2, credited  # lookalikes such as SIAY and STAY
    assert accuracy(read, texts) >= 0.97


def test_pictures_without_text_stay_in_their_place():
    wall = np.full((64, 128, 3), world.SIGNS["green"], np.uint8)
    noisy = degrade(wall[None], 1.0, 12)[0]
    love, evol = draw(["LOVE", "EVOL"])
    signs_without = []
    for shape, material in zip(2 * world.SHAPES, world.MATERIALS, strict=True):
        scene = world.Scene(text="A", shape=shape, material=material)
        left, top, right, bottom = world.text_box(scene)
        signs_without.append(world.render(scene))
        signs_without[-1][top:bottom, left:right] = world.SIGNS[scene.sign]
    blanks = [wall, noisy, np.zeros_like(wall), *signs_without]
    read = ocr.read([wall, love, noisy, *blanks, evol, wall])
    assert read == ["", "LOVE", "", *[""] * len(blanks), "EVOL", ""]


def test_a_page_on_which_tesseract_finds_nothing_keeps_its_place():
    """Tesseract itself returns nothing for the middle page: pages are told apart by form feeds alone."""
    blank = Image.new("L", (64, 64), 255)
    love, evol = (ocr.cut_out(p)[0] for p in draw(["LOVE", "EVOL"]))
    said = ocr._tesseract([blank, love, blank, blank, evol, blank], ocr.LINE, prompts.LETTERS)
    assert [text.strip() for text in said] == ["", "LOVE", "", "", "EVOL", ""]
    assert [text.strip() for text in ocr._tesseract([blank], ocr.LINE, prompts.LETTERS)] == [""]


def test_batches_arrays_lists_and_pil_images_read_alike(words, monkeypatch):
    pictures = words[0][:9]
    texts = ocr.read(pictures)
    assert accuracy(texts, words[1][:9]) > 0.8
    monkeypatch.setattr(ocr, "BATCH", 4)
    assert ocr.read(pictures) == texts
    monkeypatch.setattr(ocr, "BATCH", 1)
    assert ocr.read(list(pictures)) == texts
    assert ocr.read([Image.fromarray(p) for p in pictures]) == texts
    assert ocr.read([]) == []


def test_ink_that_differs_in_hue_only_is_read():
    """Red ink on a green sign of the same luminance: invisible in grey."""
    scene = world.Scene(text="HOUSE", sign="black", ink="white")
    left, top, right, bottom = world.text_box(scene)
    dark, light = world.SIGNS["black"][0], world.INKS["white"][0]
    share = (world.render(scene)[top:bottom, left:right, :1].astype(float) - dark) / (light - dark)
    green, red = np.array([0.0, 110, 0]), np.array([216.0, 0, 0])
    picture = np.full((64, 128, 3), (200, 200, 200), np.uint8)
    picture[12:-12, 8:-8] = green
    picture[top:bottom, left:right] = green + (red - green) * share
    grey = np.asarray(Image.fromarray(picture).convert("L"))[14:-14, 10:-10]
    assert np.ptp(grey.astype(int)) < 8
    assert ocr.read([picture]) == ["HOUSE"]


@pytest.mark.parametrize("text", ["GARDEN", "garden", "Garden"])
def test_a_tall_picture_is_read_whole_in_large_and_small_letters(text):
    page = Image.new("RGB", (512, 512), (90, 140, 200))
    font = ImageFont.truetype(str(FACE), 60)
    ImageDraw.Draw(page).text((40, 60), text, (20, 20, 20), font)
    assert ocr.read([page, draw(["LOVE"])[0]]) == ["GARDEN", "LOVE"]


def test_version():
    assert int(ocr.tesseract_version().split(".")[0]) >= 4


def test_missing_tesseract_is_one_line_that_says_how_to_install_it(monkeypatch, words):
    monkeypatch.setattr(pytesseract.pytesseract, "tesseract_cmd", "no-such-tesseract")
    for call in (ocr.tesseract_version, lambda: ocr.read(words[0][:1])):
        with pytest.raises(TextlocError) as error:
            call()
        message = str(error.value)
        assert "\n" not in message and all(w in message for w in ("apt-get", "brew", "conda"))


def test_missing_english_data_is_one_line(monkeypatch, words, tmp_path):
    monkeypatch.setenv("TESSDATA_PREFIX", str(tmp_path))
    with pytest.raises(TextlocError, match="tesseract failed") as error:
        ocr.read(words[0][:1])
    assert "\n" not in str(error.value)


def test_the_thread_limit_is_set_for_the_child_alone(monkeypatch, words):
    seen = []
    original = pytesseract.pytesseract.run_tesseract

    def spy(*args, **kwargs):
        seen.append(os.environ.get("OMP_THREAD_LIMIT"))
        return original(*args, **kwargs)

    monkeypatch.setattr(pytesseract.pytesseract, "run_tesseract", spy)
    for before in (None, "7"):
        monkeypatch.delenv("OMP_THREAD_LIMIT", raising=False)
        if before:
            monkeypatch.setenv("OMP_THREAD_LIMIT", before)
        ocr.read(words[0][:1])
        assert os.environ.get("OMP_THREAD_LIMIT") == before
    assert seen == ["1", "1"]


@pytest.mark.parametrize(
    "images",
    [
        [np.zeros((64, 128, 3))],
        [np.zeros((64, 128), np.uint8)],
        [np.zeros((3, 64, 128), np.uint8)],
        [np.zeros((0, 128, 3), np.uint8)],
    ],
)
def test_what_is_no_picture_is_refused(images):
    with pytest.raises(TextlocError, match="uint8"):
        ocr.read(images)


# --- pictures of full-size models ---------------------------------------------------------------------------------

needs_rapidocr = pytest.mark.skipif(ocr._rapid_version() is None, reason="the extra [ocr] is not installed")
ENGINES = ["tesseract", pytest.param("rapidocr", marks=needs_rapidocr)]


@pytest.mark.full
@pytest.mark.parametrize("engine", ENGINES)
def test_signs_are_read_and_found(engine):
    drawn = [sign for size in signs.SIZES for sign in signs.many(8, size, 77)]
    read = ocr.readings([sign.picture for sign in drawn], engine=engine)
    wrong = [(s.text, r.text) for s, r in zip(drawn, read, strict=True) if not metrics.exact_match(r.text, s.text)]
    assert len(wrong) <= 2, wrong
    assert {r.reader for r in read} == {ocr.reader(engine)} and ocr.reader(engine).startswith(engine)
    for sign, reading in zip(drawn, read, strict=True):
        left, top, right, bottom = (round(v) for v in sign.box)
        outside = ocr.outside_text([reading], *sign.picture.shape[:2])
        assert outside[top:bottom, left:right].mean() < 0.25
        assert outside.mean() > 0.3  # and not the whole picture


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("text", ["2024", "SALE 50%", "ROOM 24", "COFFEE\nMUSEUM"])
def test_digits_several_words_and_lines(engine, text):
    sign = signs.draw(512, random.Random(4), text)
    (reading,) = ocr.readings([sign.picture], engine=engine)
    assert metrics.exact_match(reading.text, text) and reading.text.count("\n") == text.count("\n")


@needs_rapidocr
def test_rapidocr_reads_accents_and_tesseract_refuses_them_before_anything_is_drawn():
    sign = signs.draw(512, random.Random(4), "CAFÉ")
    assert ocr.read([sign.picture], engine="rapidocr") == ["CAFÉ"]
    assert ocr.check_reader(512, ["CAFÉ", "SALE 50%"]).startswith("rapidocr")
    with pytest.raises(TextlocError, match="cannot read 'É'"):
        ocr.check_reader(512, ["CAFÉ"], "tesseract")
    with pytest.raises(TextlocError, match="cannot read 'ༀ'"):
        ocr.check_reader(512, ["\u0f00"])


@pytest.mark.parametrize("engine", ENGINES)
def test_no_text_is_told_from_text_that_is_not_read(engine, monkeypatch):
    sign = signs.draw(512, random.Random(4), "COFFEE")
    wall = np.full((512, 512, 3), 128, np.uint8)
    noisy = degrade(wall[None], 1.0, 12)[0]
    blank = Image.new("RGB", (512, 512), (200, 30, 30))
    ImageDraw.Draw(blank).rectangle((100, 150, 400, 300), (240, 240, 240), (0, 0, 0), 4)
    nothing = ocr.readings([wall, noisy, blank], engine=engine)
    assert [(r.text, r.found, str(r)) for r in nothing] == [("", False, "(no text found)")] * 3
    monkeypatch.setattr(ocr, "LEAST_SCORE", 1.1)
    monkeypatch.setattr(ocr, "_tesseract", lambda pages, mode, letters: [""] * len(pages))
    (unread,) = ocr.readings([sign.picture], engine=engine)
    assert unread.text == "" and unread.found and str(unread) == "(text found, not read)"


#: Without text, and to neither reader with any.
TEXTURES = ("gradient", "grain", "noise", "checks 8", "checks 20", "stripes 8", "stripes 20", "bricks 8", "bricks 20")
TEXTURES += ("dots 8", "windows", "plaster", "planks", "leaves", "clouds", "photograph of grass")


@pytest.mark.full
@pytest.mark.parametrize("engine", ENGINES)
def test_textures_are_no_text(engine):
    pictures = textures.every(512)
    found = ocr.readings([pictures[name] for name in TEXTURES], engine=engine)
    assert {name: str(reading) for name, reading in zip(TEXTURES, found, strict=True) if reading.found} == {}


def turned(picture, way):
    return np.ascontiguousarray(way(picture))


#: Text that a reader may misread or not read at all; that it is there can be seen all the same.
HARD = {
    "mirrored": lambda: turned(signs.draw(512, random.Random(5), "COFFEE").picture, np.fliplr),
    "upside down": lambda: turned(signs.draw(512, random.Random(6), "BAKERY").picture, np.flipud),
    "on its head": lambda: turned(signs.draw(512, random.Random(7), "STATION").picture, lambda x: np.rot90(x, 2)),
    "negative": lambda: 255 - signs.draw(512, random.Random(8), "MUSEUM").picture,
    "Greek": lambda: signs.draw(512, random.Random(9), "ΚΑΦΕΣ").picture,
    "Cyrillic": lambda: signs.draw(512, random.Random(10), "ЖИЗНЬ").picture,
    "numbers": lambda: signs.draw(512, random.Random(11), "31415926").picture,
    "one letter often": lambda: signs.draw(512, random.Random(12), "IIIIII").picture,
    "blurred": lambda: degrade(signs.draw(512, random.Random(13), "GUITAR").picture[None], 2.5, 0)[0],
    "noisy": lambda: degrade(signs.draw(512, random.Random(14), "VIOLIN").picture[None], 0.5, 40)[0],
    "small": lambda: np.pad(signs.draw(256, random.Random(15), "FOREST").picture, ((0, 256), (0, 256), (0, 0)), "edge"),
    "two lines": lambda: signs.draw(512, random.Random(16), "OCEAN\nHARBOR").picture,
}


@pytest.mark.full
@pytest.mark.parametrize("engine", ENGINES)
def test_text_that_is_hard_to_read_is_found(engine):
    found = ocr.readings([make() for make in HARD.values()], engine=engine)
    assert [name for name, reading in zip(HARD, found, strict=True) if not reading.found] == []


def test_text_of_a_miniature_stands_where_it_was_drawn():
    scene = world.Scene(text="LOVE", sign="blue", ink="yellow", shape="banner", material="brick", dy=4)
    found, none = ocr.readings([world.render(scene), np.full((64, 128, 3), world.SIGNS["green"], np.uint8)])
    left, top, right, bottom = world.text_box(scene)
    (box,) = found.boxes
    assert left <= box[0] < left + world.PITCH and right - world.PITCH < box[2] <= right
    assert top <= box[1] < box[3] <= bottom and box[3] - box[1] > (bottom - top) / 2
    assert (found.text, none.text, none.boxes) == ("LOVE", "", ())


def test_full_size_pictures_are_read_without_the_extra(monkeypatch):
    monkeypatch.setattr(ocr, "_rapid_version", lambda: None)
    assert ocr.engine_of(512) == ocr.engine_of(64) == "tesseract"
    with pytest.raises(TextlocError, match=r"textloc-utils\[ocr\]"):
        ocr.readings([np.zeros((256, 256, 3), np.uint8)], engine="rapidocr")
    with pytest.raises(TextlocError, match="unknown reader"):
        ocr.engine_of(512, "ocrmac")


@pytest.mark.parametrize("engine", ENGINES)
def test_outside_the_text_means_the_same_for_full_size_pictures(engine, monkeypatch):
    """Another text on the same sign is no change outside the text; another wall is."""
    monkeypatch.setattr(ocr, "engine_of", lambda height, asked="auto", known=engine: known)
    font = ImageFont.truetype(str(FACE), 60)

    def sign(text):
        page = Image.new("RGB", (512, 512), (90, 140, 200))
        brush = ImageDraw.Draw(page)
        brush.rectangle((60, 160, 450, 330), (240, 240, 235), (20, 20, 20), 5)
        brush.text((255, 245), text, (20, 20, 20), font, anchor="mm")
        return degrade(np.asarray(page)[None], 0.7, 5)[0]

    source, other = sign("COFFEE"), sign("BAKERIES")
    wall = np.where(ocr.outside_text(ocr.readings([source]), 512, 512)[:, :, None], 255 - source, source)
    mask = ocr.outside(np.stack([other, wall]), source)
    assert mask.shape == (2, 512, 512) and mask.mean() > 0.5
    plain = np.broadcast_to(source, (2, 512, 512, 3))
    same, changed = metrics.mse(np.stack([other, wall]), plain, mask)
    assert same < 0.05 * metrics.mse(other, source) and changed > 100 * same
    monkeypatch.setattr(ocr, "readings", lambda *_, **__: pytest.fail("read a picture of a miniature's size"))
    small = ocr.outside(source[None, :64, :128], source[:64, :128])
    assert small.shape == (64, 128) and small.all()


def test_text_that_covers_everything_leaves_the_whole_picture_to_compare():
    everywhere = ocr.Reading(text="", boxes=((0, 0, 64, 64),), reader="")
    assert ocr.outside_text([everywhere], 64, 64).all()
