"""Prompts: pairs differ in one thing, sets and files give what they name, and what is no prompt is refused."""

import itertools

import pytest

from textloc_utils import prompts
from textloc_utils.settings import TextlocError


def test_pairs_differ_in_the_text_only():
    pairs = prompts.make_pairs(60)
    for pair in pairs:
        assert prompts.replace_text(pair.source, pair.target_text) == pair.target
        assert all(a != b for a, b in zip(pair.source_text, pair.target_text, strict=False))
        assert {pair.source_text, pair.target_text} <= set(prompts.test_words())
    assert [pair.seed for pair in pairs] == list(range(42, 102))
    # All pairs of two colours come, before one comes again.
    looks = [prompts.replace_text(pair.source, "X") for pair in pairs]
    named = {prompts.TEMPLATE.format(wall=a, sign=b, text="X") for a, b in itertools.permutations(prompts.COLOURS, 2)}
    assert set(looks[: len(named)]) == named and len(named) == 42
    assert prompts.make_pairs(5) == pairs[:5] != prompts.make_pairs(5, 1)


def test_no_insult_is_in_a_pair():
    table = prompts.words_table()
    mild = set(table.word[table.band == prompts.MILD])
    assert len(mild) > 100 and mild <= set(prompts.words("held-out")) and not mild & set(prompts.test_words())


def test_sets_of_pairs():
    simple = prompts.make_pairs(3, template=prompts.SETS["simple"])
    assert all(p.source == f'A sign that says "{p.source_text}".' for p in simple)
    creative = prompts.make_pairs(12, template=prompts.SETS["creative"])
    shapes = [next(s for s in ("sign", "plate", "banner") if f" {s}" in p.source) for p in creative]
    assert shapes == 2 * ["sign", "sign", "plate", "plate", "banner", "banner"]
    assert [" reads " in p.source for p in creative] == 6 * [False, True]
    both = prompts.pairs_of(("simple", "creative"), 5)
    assert [p.source.startswith("A sign that says") for p in both] == [True] * 3 + [False] * 2
    assert len({p.seed for p in both}) == 5
    with pytest.raises(TextlocError, match="unknown set of prompts 'hard'; allowed: book, simple, creative"):
        prompts.pairs_of(("hard",), 5)
    with pytest.raises(TextlocError, match="at least one pair"):
        prompts.make_pairs(0)


def test_pairs_from_a_file_of_prompts(tmp_path):
    path = tmp_path / "bench.txt"
    path.write_text('A poster that reads "ONE".\n\nThe word "TWO" on a cake.\nA mug with "SIX" on it.\n')
    pairs = prompts.load_pairs(path, 3)
    assert {p.source_text for p in pairs} == {"ONE", "TWO", "SIX"}
    for pair in pairs:
        assert pair.source_text != pair.target_text
        assert prompts.replace_text(pair.source, pair.target_text) == pair.target
    with pytest.raises(TextlocError, match="has 3 prompts"):
        prompts.load_pairs(path, 4)


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "cannot read prompts"), ("\n \n", "has no prompt"), ('a "A"\nb "A"\n', "two different quoted texts")],
)
def test_files_without_pairs_are_refused(text, said, tmp_path):
    path = tmp_path / "bench.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(TextlocError, match=said):
        prompts.load_pairs(path, 1)


@pytest.mark.parametrize("prompt", ["no text here", 'empty ""', 'two "A" and "B"'])
def test_a_prompt_without_one_quoted_text_is_refused(prompt):
    with pytest.raises(TextlocError, match="exactly one text in double quotes"):
        prompts.quoted_text(prompt)
