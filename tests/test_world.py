"""The miniatures' world: what is drawn is what the scene says, captions are right, and every factor is read back."""

import random
import re
from collections import Counter

import numpy as np
import pytest

from textloc_utils import prompts
from textloc_utils.miniatures import factors, world
from textloc_utils.miniatures.encoders import KINDS, pretrain
from textloc_utils.miniatures.tokenizers import pieces


def drawn(n, seed=0, only=world.SECOND, **how):
    rng = random.Random(seed)
    return [world.random_scene(rng, only, **how) for _ in range(n)]


def test_every_ink_can_be_told_from_its_sign():
    assert set(world.READABLE) == set(world.SIGNS)
    for sign, inks in world.READABLE.items():
        assert len(inks) >= 2
        for ink in inks:
            assert abs(world.grey(world.INKS[ink]) - world.grey(world.SIGNS[sign])) >= 60
    assert all(s.ink in world.READABLE[s.sign] for s in drawn(500))


def test_each_letter_has_one_material():
    assert sorted("".join(world.GROUPS.values())) == list(prompts.LETTERS)
    assert set(world.OWN.values()) == set(world.MATERIALS)


def test_the_material_follows_the_first_letter_four_times_out_of_five():
    scenes = drawn(4000)
    own = np.mean([s.material == world.OWN[s.text[0]] for s in scenes])
    assert 0.77 < own < 0.83
    # The other times each of the others is as likely.
    others = Counter(s.material for s in scenes if s.material != world.OWN[s.text[0]] and s.text[0] in "SJVY")
    assert set(others) == set(world.MATERIALS) - {"brick"} and max(others.values()) < 3 * min(others.values())


def test_nothing_else_follows_from_the_text_or_from_each_other():
    scenes = drawn(6000, seed=1)
    for factor in ("typeface", "sign", "shape", "dy"):
        table = Counter((world.OWN[s.text[0]], getattr(s, factor)) for s in scenes)
        per_group = Counter(world.OWN[s.text[0]] for s in scenes)
        values = {getattr(s, factor) for s in scenes}
        shares = [[table[g, v] / per_group[g] for g in per_group] for v in values]
        assert max(max(row) - min(row) for row in shares) < 0.12


def test_words_stand_at_every_column_where_they_fit():
    places = Counter((len(s.text), s.column) for s in drawn(4000, seed=2, only=world.EVERYWHERE))
    assert set(places) == {(n, c) for n in world.LENGTHS for c in range(world.COLUMNS - n + 1)}
    assert all(s.column == 0 for only in (world.SECOND, world.PLAIN) for s in drawn(100, only=only))


def test_scenes_differ_in_the_factor_that_changes():
    base = {"text": "HELLO", "sign": "orange", "ink": "black"}
    one = world.render(world.Scene(**base))
    changes = ({"material": "brick"}, {"typeface": "serif"}, {"shape": "banner"}, {"ink": "white"}, {"dy": 4})
    for change in (*changes, {"column": 1}, {"phase": (3, 5)}, {"tint": 7}, {"sign": "white"}):
        assert (world.render(world.Scene(**base | change)) != one).any(), change
    assert one.shape == (world.HEIGHT, world.WIDTH, 3) and one.dtype == np.uint8


def test_text_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="1 to 4 letters fit at column 2"):
        world.render(world.Scene(text="HELLO", column=2))


def test_runs_are_letters_in_runs():
    for scene in drawn(300, runs=True):
        assert len(scene.text) in world.LENGTHS
        assert len(re.findall(r"(.)\1*", scene.text)) <= 3
    assert any(len(set(s.text)) == 1 for s in drawn(20, runs=True))


# --- captions --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def captions():
    rng = random.Random(5)
    return [(s, world.caption(s, rng)) for s in drawn(4000, seed=5)]


def test_captions_say_the_text_and_put_it_first_in_half_of_them(captions):
    assert all(world.quoted(text) == scene.text for scene, text in captions)
    before = [len(text.split('"')[0].split()) for _, text in captions]
    assert min(before) == 0 and max(before) == 6 and set(before) == set(range(7))
    assert 0.46 < np.mean([b == 0 for b in before]) < 0.54


def test_captions_name_what_the_world_says_how_often(captions):
    said = {
        "ink": [re.search(rf"\b{s.ink} letters", t, re.I) is not None for s, t in captions],
        "typeface": [re.search(rf"\b{s.typeface}\b", t, re.I) is not None for s, t in captions],
        "sign": [re.search(rf"\ban? {s.sign} {s.shape}\b", t, re.I) is not None for s, t in captions],
        "material": [f"gainst {s.material}" in t for s, t in captions],
    }
    for factor, found in said.items():
        assert abs(np.mean(found) - world.SECOND.named[factor]) < 0.03, factor


def test_captions_never_name_what_is_not_there(captions):
    for scene, text in captions[:1000]:
        words = set(re.findall("[a-z]+", re.sub('"[^"]*"', "", text.lower())))
        assert words & set(world.MATERIALS) <= {scene.material}
        assert words & set(world.TYPEFACES) <= {scene.typeface}
        assert words & {*world.SIGNS, *world.INKS} <= {scene.sign, scene.ink}


def test_articles_are_right(captions):
    texts = [text for _, text in captions] + [
        world.prompt("HI", sign="orange", shape="sign", ink="red", typeface="plain", material="brick")
    ]
    for text in texts:
        for found, word in re.findall(r"\b(an?) ([a-z]+)", text, re.I):
            assert (found.lower() == "an") == (word[0] in "aeiou"), text
        assert text[0] == '"' or text[0].isupper()
        assert text.endswith(".")


def test_the_plain_world_names_everything():
    rng = random.Random(1)
    for scene in drawn(200, only=world.PLAIN):
        text = world.caption(scene, rng, world.PLAIN).lower()
        assert f"{scene.ink} letters" in text and f"{scene.sign} sign" in text and scene.material not in text


@pytest.mark.parametrize("kind", KINDS)
def test_every_caption_fits_and_is_known_to_every_tokenizer(captions, kind):
    tokenizer = KINDS[kind].make_tokenizer()
    texts = [text for _, text in captions]
    ids = tokenizer(texts).input_ids
    assert max(map(len, ids)) <= KINDS[kind].tokens
    assert not any(tokenizer.unk_token_id in row for row in ids)
    assert tokenizer(texts[0].lower()).input_ids == ids[0]
    tokens = tokenizer.convert_ids_to_tokens(tokenizer('A sign says "A".').input_ids)
    assert [t for t in tokens if t not in tokenizer.all_special_tokens] == ["an", "sign", "says", '"', "a", '"', "."]
    assert tokenizer.convert_ids_to_tokens(tokenizer("A turquoise sign.").input_ids).count("<unk>") == 1


def test_subwords_hold_several_letters_in_quotes_only():
    letters, subwords = (KINDS[kind].make_tokenizer() for kind in ("clip", "clip-subwords"))
    assert len(pieces()) == 150 and {len(p) for p in pieces()} == {2, 3} and not set(pieces()) & set(world.vocabulary())

    def split(tokenizer, text):
        found = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
        return [t for t in found if t not in tokenizer.all_special_tokens]

    text = 'The word "STRING" in white letters.'
    assert split(letters, text) == ["the", "word", '"', *"string", '"', "in", "white", "letters", "."]
    pieced = split(subwords, text)
    inside = pieced[pieced.index('"') + 1 : -5]
    assert "".join(inside) == "string" and len(inside) < 6 and pieced[-4:] == ["in", "white", "letters", "."]


def test_random_encoders_are_as_they_were_drawn():
    first, right = pretrain(KINDS["clip-random"], seed=3, steps=100)
    again, _ = pretrain(KINDS["clip-random"], seed=3, steps=1)
    other, _ = pretrain(KINDS["clip-random"], seed=4, steps=1)
    weights = [encoder.text_model.embeddings.token_embedding.weight for encoder in (first, again, other)]
    assert right == 0 and (weights[0] == weights[1]).all() and (weights[0] != weights[2]).any()
    assert not any(p.requires_grad for p in first.parameters())


# --- readers ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known():
    scenes = drawn(200, seed=9)
    return scenes, np.stack([world.render(s) for s in scenes])


def test_every_factor_is_read_back_from_renders(known):
    scenes, pictures = known
    assert min(factors.right(factors.read(pictures), scenes).values()) == 1.0


def test_every_factor_is_read_back_from_small_pictures(known):
    scenes, pictures = known
    small = pictures.reshape(len(scenes), 32, 2, 64, 2, 3).mean((2, 4)).astype(np.uint8)
    assert min(factors.right(factors.read(small), scenes).values()) >= 0.95


def test_masks_come_from_the_picture_itself(known):
    scenes, pictures = known
    for scene, reading in zip(scenes[:20], factors.read(pictures[:20]), strict=True):
        left, top, right, bottom = world.text_box(scene)
        mask = reading.outside_text()
        assert not mask[top:bottom, left:right].any() and mask.sum() == mask.size - (bottom - top) * (right - left)
        assert (reading.outside_sign() == (world.sign_cover(scene.shape, scene.dy) == 0)).all()


@pytest.mark.parametrize(("letters", "columns"), [(0, 3), (2, 3), (3, 3), (4, 4), (6, 4)])  # four columns are left
def test_masks_have_room_for_so_many_letters_as_far_as_they_fit(letters, columns):
    (reading,) = factors.read(world.render(world.Scene(text="CAT", column=2, dy=4))[None])
    mask = reading.outside_text(letters)
    left, top, _, bottom = world.text_box(world.Scene(text="CAT", column=2, dy=4))
    assert not mask[top:bottom, left : left + columns * world.PITCH].any()
    assert (~mask).sum() == (bottom - top) * columns * world.PITCH


def test_no_text_is_read_from_an_empty_sign_or_noise(known):
    scenes, pictures = known
    empty = pictures[0].copy()
    empty[14:50, 8:120] = world.SIGNS["yellow"]
    noise = np.random.default_rng(0).integers(0, 256, empty.shape, dtype=np.uint8)
    read = factors.read(np.stack([empty, noise]))
    assert [r.text for r in read] == ["", ""] and read[0].ink == read[0].typeface == ""
    assert read[0].outside_text().all() and read[0].outside_text(6).all()
