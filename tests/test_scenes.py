"""Scenes: what is drawn is what the caption says, and the letters can be read back."""

import random

import numpy as np
import pytest

from textloc_utils import prompts
from textloc_utils.miniatures import reader, scenes


def _scene(**change):
    return scenes.Scene(**({"wall": "blue", "sign": "yellow", "shape": "sign", "text": "HELLO"} | change))


def test_colours_are_where_the_caption_says():
    picture = scenes.render(_scene())
    assert tuple(picture[0, 0]) == scenes.RGB["blue"]
    left, top, right, bottom = scenes.text_box(_scene())
    assert tuple(picture[(top + bottom) // 2, left - 4]) == scenes.RGB["yellow"]


def test_the_noise_moves_the_sign_and_nothing_else():
    still, moved = scenes.render(_scene()), scenes.render(_scene(dy=-4))
    assert np.array_equal(moved[:-4], still[4:])


def test_a_letter_s_place_does_not_depend_on_the_others():
    one, other = scenes.render(_scene(text="HELLO")), scenes.render(_scene(text="HAT"))
    assert np.array_equal(one[:, : scenes.LEFT + scenes.PITCH], other[:, : scenes.LEFT + scenes.PITCH])


@pytest.mark.parametrize("shape", prompts.SHAPES)
def test_shapes_differ(shape):
    others = [scenes.render(_scene(shape=s)) for s in prompts.SHAPES if s != shape]
    assert all((scenes.render(_scene(shape=shape)) != other).any() for other in others)


def test_letters_are_read_back():
    rng = random.Random(3)
    todo = [scenes.random_scene(rng) for _ in range(60)]
    assert reader.read(np.stack([scenes.render(s) for s in todo])) == [s.text for s in todo]


def test_no_letters_are_read_from_an_empty_sign_or_noise():
    empty = scenes.render(_scene(text="H"))
    left, top, right, bottom = scenes.text_box(_scene(text="H"))
    empty[top:bottom, left:right] = scenes.RGB["yellow"]
    noise = np.random.default_rng(0).integers(0, 256, empty.shape, dtype=np.uint8)
    assert reader.read(np.stack([empty, noise])) == ["", ""]


def test_every_letter_stays_inside_the_region_that_masks_use():
    left, top, right, bottom = scenes.letters_region()
    for dy in scenes.HEIGHTS:
        box = scenes.text_box(_scene(text="ABCDEF", dy=dy))
        assert left <= box[0] and top <= box[1] and box[2] <= right and box[3] <= bottom


def test_too_many_letters_are_refused():
    with pytest.raises(ValueError, match="1 to 6 letters"):
        scenes.render(_scene(text="ABCDEFG"))


def test_captions_name_text_and_mostly_colours():
    rng = random.Random(0)
    made = [scenes.caption(_scene(), rng) for _ in range(200)]
    assert all(prompts.quoted_text(c) == "HELLO" for c in made)
    named = [("blue" in c) and ("yellow" in c) for c in made]
    assert 0.7 < np.mean(named) < 0.97


def test_pairs_differ_in_the_text_only():
    pairs = prompts.make_pairs(60)
    assert len({(p.wall, p.sign) for p in pairs}) == 56
    for pair in pairs:
        assert prompts.replace_text(pair.source, pair.target_text) == pair.target
        assert all(a != b for a, b in zip(pair.source_text, pair.target_text, strict=False))
        assert {pair.source_text, pair.target_text} <= set(prompts.words("held-out"))


def test_sets_of_pairs():
    simple = prompts.make_pairs(3, template=prompts.SETS["simple"])
    assert all(p.source.startswith("A sign that says") and p.wall == p.sign == "" for p in simple)
    creative = prompts.make_pairs(12, template=prompts.SETS["creative"])
    assert {p.shape for p in creative} == set(prompts.SHAPES)
    for pair in prompts.make_pairs(20, other_colours=True):
        assert len({pair.wall, pair.sign, pair.target_wall, pair.target_sign}) == 4
        assert f"A {pair.target_sign} sign on a {pair.target_wall} wall" in pair.target


def test_pairs_from_a_file_of_prompts(tmp_path):
    path = tmp_path / "bench.txt"
    path.write_text('A poster that reads "ONE".\n\nThe word "TWO" on a cake.\nA mug with "SIX" on it.\n')
    pairs = prompts.load_pairs(path, 3)
    assert {p.source_text for p in pairs} == {"ONE", "TWO", "SIX"}
    for pair in pairs:
        assert pair.source_text != pair.target_text
        assert prompts.replace_text(pair.source, pair.target_text) == pair.target
    with pytest.raises(prompts.TextlocError, match="holds 3 prompts"):
        prompts.load_pairs(path, 4)


def test_colours_are_read_from_scenes():
    rng = random.Random(5)
    for scene in (scenes.random_scene(rng) for _ in range(60)):
        assert scenes.read_colours(scenes.render(scene)) == (scene.wall, scene.sign)


@pytest.mark.parametrize("prompt", ["no text here", 'empty ""', 'two "A" and "B"'])
def test_a_prompt_without_one_quoted_text_is_refused(prompt):
    with pytest.raises(prompts.TextlocError, match="exactly one text in double quotes"):
        prompts.quoted_text(prompt)
