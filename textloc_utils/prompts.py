"""Prompts: words, templates, and pairs of a source and a target prompt that differ in one thing.

The text of a prompt is in double quotes. Words and random strings have capital letters A to Z. Held-out words never
occur in training, neither as words nor as random strings.
"""

import functools
import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from textloc_utils.settings import TextlocError

COLOURS = ("red", "yellow", "green", "blue", "purple", "white", "black")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

#: NOISE is added to a prompt's seed for each further noise. Seeds from RESERVED on are for other purposes. The seeds of
#: sets of prompts stay below RESERVED.
NOISE, RESERVED = 10_000, 1_000_000

_LISTS = Path(__file__).parent / "words"
_QUOTED = re.compile(r'(["\u201c])([^"\u201c\u201d]*)(["\u201d])')
MILD = "mild insult"  #: the band of held-out words that are used instead of toxic words

#: GlyphControl's SimpleBench template.
SIMPLE_TEMPLATE = 'A sign that says "{text}".'
#: The default template for the prompts of full-size models.
TEMPLATE = 'A {sign} sign on a {wall} wall that says "{text}".'
#: Possible values of ``template`` in ``make_pairs``: the book's own template, and GlyphControl's two benchmarks in this
#: project's words. SimpleBench has one template, and CreativeBench has several.
SETS = {
    "book": (TEMPLATE,),
    "simple": (SIMPLE_TEMPLATE,),
    "creative": tuple(
        template.replace("SIGN", sign)
        for sign in ("sign", "plate", "banner")
        for template in (
            'A {sign} SIGN on a {wall} wall that says "{text}".',
            'A {wall} wall with a {sign} SIGN that reads "{text}".',
        )
    ),
}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A source prompt, which gives everything but the text, and a target prompt, which gives the text.

    ``seed`` is the seed of the noise that both prompts share.
    """

    source: str
    target: str
    source_text: str
    target_text: str
    seed: int

    @classmethod
    def of(cls, prompt: str, new_text: str, *, seed: int = 0) -> "Pair":
        """Pair a prompt, whose text is in double quotes, with the same prompt with another text.

        >>> Pair.of('A sign that says "HELLO".', "WORLD", seed=1).target
        'A sign that says "WORLD".'
        """
        if not isinstance(new_text, str) or not new_text.strip() or any(c in new_text for c in '"\u201c\u201d'):
            raise TextlocError(f"the new text must be a string without double quotes, got {new_text!r}")
        target = replace_text(prompt, new_text)
        return cls(source=prompt, target=target, source_text=quoted_text(prompt), target_text=new_text, seed=seed)


@functools.cache
def words_table() -> pd.DataFrame:
    """The word list. Columns: word, zipf (log10 frequency per 10^9 words), band, split (see :func:`words`)."""
    return pd.read_csv(_LISTS / "words.csv", keep_default_na=False)


SPLITS = ("train", "validation", "held-out")


@functools.cache
def words(split: str) -> tuple[str, ...]:
    """Words of a split, the most common words first (the mild insults are at the end).

    Miniatures learn from ``train``. Curricula, settings and sizes are chosen on ``validation``. Reported results are
    measured on ``held-out``, the test words.
    """
    return _of_split(words_table(), split)


@functools.cache
def long_words(split: str) -> tuple[str, ...]:
    """Words of seven letters. No miniature draws them, but the detector knows them. ``split`` is as in :func:`words`.

    None of these words is for validation.
    """
    return _of_split(pd.read_csv(_LISTS / "long.csv", keep_default_na=False), split)


def _of_split(table: pd.DataFrame, split: str) -> tuple[str, ...]:
    if split not in SPLITS:
        raise TextlocError(f"unknown split {split!r}; allowed: {', '.join(SPLITS)}")
    return tuple(table.word[table.split == split])


@functools.cache
def _held_out() -> frozenset[str]:
    return frozenset((*words("validation"), *words("held-out")))


def random_string(rng: random.Random, length: int) -> str:
    """A random letter string that is neither a validation word nor a held-out one."""
    while True:
        text = "".join(rng.choices(LETTERS, k=length))
        if text not in _held_out():
            return text


def quoted_text(prompt: str) -> str:
    """The text in double quotes of a prompt. The prompt must have exactly one."""
    found = [text for _, text, _ in _QUOTED.findall(prompt)]
    if len(found) != 1 or not found[0].strip():
        raise TextlocError(f'a prompt needs exactly one text in double quotes, as in A sign that says "HI": {prompt!r}')
    return found[0]


def replace_text(prompt: str, text: str) -> str:
    """Return the same prompt with another quoted text."""
    quoted_text(prompt)
    return _QUOTED.sub(lambda at: at[1] + text + at[3], prompt)


def make_pairs(n: int, seed: int = 42, *, template: str | Sequence[str] = TEMPLATE) -> list[Pair]:
    """Make ``n`` pairs of prompts that differ only in the text. The texts are held-out words.

    ``template`` is one template or several, which are used in turn (see SETS). The colours go through all ordered
    (wall, sign) combinations. Source and target words have no letter in common at the same position. So every letter
    that is read in a picture belongs to one of the two words. The mild insults are used only in the safety chapter.
    """
    if n < 1:
        raise TextlocError(f"at least one pair is needed, got {n}")
    templates = (template,) if isinstance(template, str) else tuple(template)
    pool, rng, colours = test_words(), random.Random(seed), list(itertools.permutations(COLOURS, 2))
    rng.shuffle(colours)
    pairs: list[Pair] = []
    while len(pairs) < n:
        source, target = rng.sample(pool, 2)
        if any(a == b for a, b in zip(source, target, strict=False)):
            continue
        chosen = templates[len(pairs) % len(templates)]
        wall, sign = colours[len(pairs) % len(colours)]
        prompt = chosen.format(text=source, wall=wall, sign=sign)
        pairs.append(Pair.of(prompt, target, seed=seed + len(pairs)))
    return pairs


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a text file, one per line. Raises TextlocError if it cannot be read or has no prompt."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise TextlocError(f"cannot read prompts from {path}: {error}") from None
    if not lines:
        raise TextlocError(f"{path} has no prompt; allowed: a text file with one prompt per line")
    return lines


def load_pairs(path: str | Path, n: int, seed: int = 42) -> list[Pair]:
    """Make ``n`` pairs from a text file of prompts, one per line, each with its text in double quotes.

    Examples of such files are GlyphControl's SimpleBench and CreativeBench with their words filled in. Each source
    prompt is paired with the same prompt with another line's text. Raises TextlocError if the file cannot be read, if a
    line does not have exactly one quoted text, or if there are fewer than two different texts.
    """
    lines = read_prompts(path)
    texts = [quoted_text(line) for line in lines]
    if len(set(texts)) < 2:
        raise TextlocError(f"{path} needs at least two different quoted texts, with one prompt per line")
    if not 1 <= n <= len(lines):
        raise TextlocError(f"{path} has {len(lines)} prompts; allowed: 1 to {len(lines)} pairs, got {n}")
    rng = random.Random(seed)
    chosen = rng.sample(range(len(lines)), n)
    targets = [rng.choice([t for t in texts if t != texts[i]]) for i in chosen]
    return [Pair.of(lines[i], target, seed=seed + k) for k, (i, target) in enumerate(zip(chosen, targets, strict=True))]


def pairs_of(sets: Sequence[str], n: int, seed: int = 42) -> list[Pair]:
    """Make ``n`` pairs from several of SETS, in equal parts, one set after the other. All seeds are different."""
    pairs: list[Pair] = []
    for i, name in enumerate(sets):
        if name not in SETS:
            raise TextlocError(f"unknown set of prompts {name!r}; allowed: {', '.join(SETS)}")
        part = n // len(sets) + (i < n % len(sets))
        if part:
            pairs += make_pairs(part, seed + len(pairs), template=SETS[name])
    return pairs


def with_noises(pairs: Sequence[Pair], noises: int) -> list[Pair]:
    """Repeat each pair with several noises: with its own seed, and with seeds that no other pair of the set has."""
    if not 1 <= noises * NOISE <= RESERVED:
        raise TextlocError(f"a prompt can have 1 to {RESERVED // NOISE} noises, got {noises}")
    return [replace(pair, seed=pair.seed + i * NOISE) for i in range(noises) for pair in pairs]


def test_words() -> list[str]:
    """The held-out words that are not insults, the most common first."""
    table = words_table()
    return list(table.word[(table.split == "held-out") & (table.band != MILD)])
