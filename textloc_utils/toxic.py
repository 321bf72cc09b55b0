"""Toxic words in prompts: find them, however they are spelled, and put a harmless word in their place.

**Where it looks.** In what the prompt asks to be written: texts in quotes of any kind, nested or left open, and,
outside quotes, whatever follows a word of writing ("says", "reads", "the text") up to a quote or the end of the
sentence. The rest of a prompt describes the scene, where a clown is a clown: it is left alone.

**How it reads.** Case, accents, invisible characters and letters that look like Latin ones are undone first. Then a
word counts as one of the list if it is that word, with any of its letters repeated; with digits and signs in place of
some letters; with spaces or marks between its letters; or with one letter wrong, left out, added or swapped, if both
have five letters or more, begin with the same letter, and it is no ordinary word itself. A word cut in two counts when
the quoted text is nothing but its parts. Not found: a word spread over several quoted texts, a word inside a longer
one, and spellings further off.

Any callable that takes a prompt and returns :class:`Finding` objects can take the detector's place, as the one
that :func:`classifier` makes of a transformers text classifier.
"""

import functools
import itertools
import random
import re
import unicodedata
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pandas as pd
from rapidfuzz import process
from rapidfuzz.distance import OSA

from textloc_utils.prompts import LETTERS, MILD, long_words, words, words_table
from textloc_utils.settings import TextlocError

#: Least number of letters of a word that is found with a letter wrong.
FUZZY = 5
#: Harmless words by length; the longest stands for all longer words.
HARMLESS = ("SUN", "TEA", "SKY", "TREE", "MOON", "BLUE", "HELLO", "CLOUD", "MUSIC", "GARDEN", "SUMMER", "FLOWER")
HARMLESS += ("RAINBOW", "MORNING", "WELCOME")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A toxic text: ``prompt[start:end]``, ``text``, stands for ``word``."""

    start: int
    end: int
    text: str
    word: str


class Detector(Protocol):
    """What finds toxic text: called with a prompt, returns its findings."""

    def __call__(self, prompt: str) -> Sequence[Finding]: ...


# --- the list -------------------------------------------------------------------------------------------------


def mild_words() -> tuple[str, ...]:
    """The built-in list: insults that a newspaper prints, a stand-in for the paper's list of toxic words."""
    table = words_table()
    return tuple(table.word[table.band == MILD])


def ordinary_words(*splits: str) -> tuple[str, ...]:
    """The words of the word lists' given splits (train, validation, held-out) that are no mild insults."""
    toxic = frozenset(mild_words())
    return tuple(w for split in splits for w in (*words(split), *long_words(split)) if w not in toxic)


def read_words(path: str | Path) -> tuple[str, ...]:
    """A word list from a text file, one word in each line; TextlocError for what is no word of 2 to 30 letters."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TextlocError(f"cannot read words from {path}: {error}") from None
    return _capitals([line.strip() for line in lines if line.strip()], str(path))


def _capitals(listed: Iterable[str], where: str) -> tuple[str, ...]:
    """A list's words in capitals, each once; TextlocError for what is no word of 2 to 30 letters, or for no word."""
    found = tuple(dict.fromkeys(word.upper() for word in listed))
    for word in found:
        if set(word) - set(LETTERS) or not 2 <= len(word) <= 30:
            raise TextlocError(f"{where}: each entry must be one word of 2 to 30 letters A to Z, got {word[:40]!r}")
    if not found:
        raise TextlocError(f"{where} holds no word")
    return found


# --- characters -----------------------------------------------------------------------------------------------

#: Greek, Cyrillic and other letters by the Latin one that they look like; what Unicode names as a Latin letter, in
#: whatever style, needs no entry.
_LOOKALIKES = {
    **dict(zip("ΑΒΕΖΗΙΚΜΝΟΡΤΥΧ", "ABEZHIKMNOPTYX", strict=True)),
    **dict(zip("αβεικνορτυχωϲϳ", "ABEIKVOPTUXWCJ", strict=True)),
    **dict(zip("АВЕЗКМНОРСТУХЅІЈЬ", "ABE3KMHOPCTYXSIJB", strict=True)),
    **dict(zip("авезкмнорстухѕіјьԁԛԝһ", "ABE3KMHOPCTYXSIJBDQWH", strict=True)),
    **dict(zip("ՕՍՏԼոսցհօ", "OUSLNUGHO", strict=True)),
}
#: Digits and signs by the letters that they stand for.
_STAND_INS = {"0": "O", "1": "IL", "3": "E", "4": "A", "5": "S", "6": "G", "7": "T", "8": "B", "9": "G", "@": "A"}
_STAND_INS |= {"$": "S", "€": "E", "£": "L", "|": "IL", "!": "IL", "+": "T"}
#: Signs that stand for a letter between two others only: elsewhere they are punctuation.
_BETWEEN = "!+|"
_FILLERS = "\u115f\u1160\u3164\uffa0"
_LATIN = re.compile(
    r"(?:LATIN|SQUARED|NEGATIVE|REGIONAL|TURNED|MODIFIER|COMBINING).*LETTER (?:SMALL CAPITAL )?([A-Z])\b"
)

_LETTER, _SIGN, _SPACE, _MARK = range(4)


@functools.lru_cache(maxsize=1 << 16)
def _read(character: str) -> tuple[tuple[int, str], ...]:
    """A character as (kind, capital or sign) units: none for an invisible one, several for a ligature."""
    units = []
    for c in unicodedata.normalize("NFKD", character):
        c = _LOOKALIKES.get(c, c)
        category = unicodedata.category(c)
        if c.isspace() or c == "\u2800":
            units.append((_SPACE, " "))
        elif category in ("Mn", "Me", "Cf", "Cc") or c in _FILLERS:
            continue
        elif c.isascii() and c.isalpha():
            units.append((_LETTER, c.upper()))
        elif c in _STAND_INS:
            units.append((_SIGN, c))
        elif c.isdigit() and str(unicodedata.digit(c)) in _STAND_INS:
            units.append((_SIGN, str(unicodedata.digit(c))))
        elif named := _LATIN.match(unicodedata.name(c, "")):
            units.append((_LETTER, named[1]))
        else:
            units.append((_MARK, c))
    return tuple(units)


@dataclass(frozen=True)
class _Unit:
    """A letter, sign, space or mark, and the place of its character in the prompt."""

    kind: int
    value: str
    at: int


# --- places ---------------------------------------------------------------------------------------------------

_DOUBLE = '"\u201c\u201d\u201e\u201f\u00ab\u00bb\u2039\u203a\u300c\u300d\u300e\u300f\uff02\u301d\u301e'
_SINGLE_OPEN, _SINGLE_CLOSE = "'`\u2018\u201a\u201b\u2032", "'`\u2019\u2032\u00b4"
_CUE = re.compile(
    r"\b(?:says?|said|saying|reads?|reading|spell(?:s|ed|ing)?|wr(?:ites?|iting|itten|ote)|texts?|words?|letters|"
    r"lettering|labell?ed|captions?|captioned|titled?|inscribed|inscription|named|called)\b",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"[.;\n](?=\s|$)")


def _regions(prompt: str) -> list[tuple[int, int]]:
    """The (start, end) of what the prompt asks to be written, in order and apart from each other."""
    found = sorted([*_double_quoted(prompt), *_single_quoted(prompt)])
    quotes = [start - 1 for start, _ in found]
    ends = [match.start() for match in _SENTENCE.finditer(prompt)]
    after = 0
    for cue in _CUE.finditer(prompt):
        if cue.end() >= after:
            after = min(_next(ends, cue.end()), _next(quotes, cue.end()), len(prompt))
            found.append((cue.end(), after))
    merged: list[tuple[int, int]] = []
    for start, end in sorted(found):
        if merged and start < merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        elif end > start:
            merged.append((start, end))
    return merged


def _next(places: list[int], start: int) -> float:
    """The first of the places (in order) from ``start`` on, infinity if there is none."""
    at = bisect_left(places, start)
    return places[at] if at < len(places) else float("inf")


def _double_quoted(prompt: str) -> Iterable[tuple[int, int]]:
    """Texts in double quotes. Which way a quote points is told by its neighbours; an open one ends with the prompt."""
    depth, start = 0, 0
    for match in re.finditer(f"[{_DOUBLE}]", prompt):
        at = match.start()
        before, after = prompt[at - 1 : at], prompt[at + 1 : at + 2]
        opens = (not before or not (before.isalnum() or before in ".,!?")) and bool(after) and not after.isspace()
        if opens or not depth:
            start = start if depth else at + 1
            depth += 1
        else:
            depth -= 1
            if not depth:
                yield start, at
    if depth:
        yield start, len(prompt)


def _single_quoted(prompt: str) -> Iterable[tuple[int, int]]:
    """Texts in single quotes: an apostrophe inside a word is none, one that is never closed neither."""
    length = len(prompt)
    closing = [
        m.start()
        for m in re.finditer(f"[{_SINGLE_CLOSE}]", prompt)
        if m.end() == length or not prompt[m.end()].isalnum()
    ]
    after = 0
    for match in re.finditer(f"[{_SINGLE_OPEN}]", prompt):
        at = match.start()
        if at < after or (at and prompt[at - 1].isalnum()) or at + 1 >= length or prompt[at + 1].isspace():
            continue
        place = bisect_left(closing, at + 1)
        if place == len(closing):
            return
        after = closing[place] + 1
        yield at + 1, closing[place]


# --- the detector ---------------------------------------------------------------------------------------------

#: Words too short for the word list that must not count as parts of a word cut in two.
_SHORT = frozenset(
    ["A", "I", "AM", "AN", "AS", "AT", "BE", "BY", "DO", "GO", "HE", "HI", "IF", "IN", "IS", "IT", "ME", "MY", "NO"]
    + ["OF", "OH", "OK", "ON", "OR", "SO", "TO", "UP", "US", "WE"]
)


class WordDetector:
    """Finds the words of a list (default: :func:`mild_words`), also in disguise; see the module's description.

    ``ordinary`` are words that are never taken for a misspelling (default: :func:`ordinary_words`). Raises TextlocError
    for a list without words, or with one that is not of 2 to 30 letters.
    """

    def __init__(self, listed: Iterable[str] | None = None, ordinary: Iterable[str] | None = None):
        self.words = mild_words() if listed is None else _capitals(listed, "the word list")
        self.ordinary = _SHORT.union(
            ordinary_words("train", "validation", "held-out") if ordinary is None else ordinary
        )
        self._listed = frozenset(self.words)
        self._lengths = sorted({len(word) for word in self.words}, reverse=True)
        self._by_runs, self._fuzzy = defaultdict(list), defaultdict(list)
        for word in self.words:
            letters, counts = _runs(word)
            self._by_runs[letters].append((counts, word))
            if len(word) >= FUZZY:
                self._fuzzy[word[0]].append(word)
        self._word = functools.lru_cache(maxsize=1 << 14)(self._find_word)

    def __call__(self, prompt: str) -> list[Finding]:
        """The toxic texts of a prompt, in order, apart from each other."""
        found: list[Finding] = []
        for start, end in _regions(prompt):
            units = [_Unit(*unit, at) for at in range(start, end) for unit in _read(prompt[at])]
            for word, first, last in sorted(self._in(units), key=lambda f: (f[1], -f[2])):
                if not found or first >= found[-1].end:
                    stop = _past_invisible(prompt, last + 1, end)
                    found.append(Finding(start=first, end=stop, text=prompt[first:stop], word=word))
        return found

    def _in(self, units: list[_Unit]) -> Iterable[tuple[str, int, int]]:
        """(word, first place, last place) of what one region holds."""
        chunks = [list(g) for space, g in itertools.groupby(units, lambda u: u.kind == _SPACE) if not space]
        single: list[_Unit] = []
        for chunk in [*chunks, []]:
            core = [u for u in chunk if u.kind != _MARK]
            if len(core) == 1:
                single += core
                continue
            if not chunk or core:
                yield from self._spelled_out(single)
                single = []
            yield from self._chunk(chunk)
        if 1 < len(chunks) <= 12:
            yield from self._cut(chunks)

    def _chunk(self, chunk: list[_Unit]) -> Iterable[tuple[str, int, int]]:
        """What stands between two spaces: as one word, else the parts between its marks."""
        found = list(self._one(chunk))
        parts = [list(g) for mark, g in itertools.groupby(chunk, lambda u: u.kind == _MARK or u.value in _BETWEEN)]
        for part in parts if len(parts) > 1 and not found else ():
            found += self._one(part)
        return found

    def _one(self, units: list[_Unit]) -> Iterable[tuple[str, int, int]]:
        kept = _strip(units)
        if not any(u.kind == _LETTER for u in kept):
            return
        for text in _spellings(kept):
            if word := self.word(text):
                yield word, kept[0].at, kept[-1].at
                return

    def _spelled_out(self, single: list[_Unit]) -> Iterable[tuple[str, int, int]]:
        """Letters that stand alone: all of them as one word, else every listed word in a row of them."""
        if len(single) < 2:
            return
        whole = list(self._one(single))
        if whole:
            yield from whole
            return
        for text in _spellings(single):
            at = 0
            while at < len(text):
                # A slice at the end is shorter than n, and could be a shorter word.
                fit = (n for n in self._lengths if 2 < n <= len(text) - at and text[at : at + n] in self._listed)
                n = next(fit, 0)
                if n:
                    yield text[at : at + n], single[at].at, single[at + n - 1].at
                at += n or 1

    def _cut(self, chunks: list[list[_Unit]]) -> Iterable[tuple[str, int, int]]:
        """A region that is nothing but one word in parts, which are not ordinary words all of them ("GO ON")."""
        parts = [_strip([u for u in chunk if u.kind != _MARK]) for chunk in chunks]
        units = [u for part in parts for u in part]
        texts = ["".join(u.value for u in part) for part in parts]
        if not units or all(text in self.ordinary for text in texts if text):
            return
        for text in _spellings(units):
            if word := self.word(text, fuzzy=False):
                yield word, units[0].at, units[-1].at
                return

    def word(self, text: str, *, fuzzy: bool = True) -> str | None:
        """The listed word that some capitals spell; None if there is none."""
        return self._word(text, fuzzy) if len(text) <= 64 else self._find_word(text, fuzzy)

    def _find_word(self, text: str, fuzzy: bool) -> str | None:
        if text in self._listed:
            return text
        letters, counts = _runs(text)
        for least, word in self._by_runs.get(letters, ()):
            if all(n >= m for n, m in zip(counts, least, strict=True)):
                return word
        if not fuzzy or text in self.ordinary or not letters or len(letters) > self._lengths[0] + 1:
            return None
        text = letters if max(counts) > 2 else text
        if len(text) < FUZZY:
            return None
        choices = self._fuzzy.get(text[0], ())
        near = process.extractOne(text, choices, scorer=OSA.distance, score_cutoff=1)
        return near[0] if near else None


def _past_invisible(prompt: str, at: int, end: int) -> int:
    """The next place from ``at`` on that shows, so that no accent is left behind."""
    while at < end and not _read(prompt[at]):
        at += 1
    return at


def _runs(text: str) -> tuple[str, tuple[int, ...]]:
    """A text without repetitions, and how often each of its letters was repeated."""
    runs = [(letter, sum(1 for _ in group)) for letter, group in itertools.groupby(text)]
    return "".join(letter for letter, _ in runs), tuple(n for _, n in runs)


def _strip(units: list[_Unit]) -> list[_Unit]:
    """Without marks, and without signs at the ends that are punctuation there."""
    kept = [u for u in units if u.kind in (_LETTER, _SIGN)]
    first = next((i for i, u in enumerate(kept) if u.value not in _BETWEEN), len(kept))
    last = next((i for i in range(len(kept), first, -1) if kept[i - 1].value not in _BETWEEN), first)
    return kept[first:last]


def _spellings(units: list[_Unit]) -> list[str]:
    """The capitals that letters and signs stand for: every reading of the first few signs that can be I or L."""
    values = [_STAND_INS.get(u.value, u.value) if u.kind == _SIGN else u.value for u in units]
    open_ = [i for i, value in enumerate(values) if len(value) > 1][:4]
    readings = []
    for letters in itertools.product("IL", repeat=len(open_)):
        chosen = dict(zip(open_, letters, strict=True))
        readings.append("".join(chosen.get(i, value[0]) for i, value in enumerate(values)))
    return readings


def classifier(classify: Callable, *, labels: Container[str], threshold: float = 0.5) -> Detector:
    """A detector around a text classifier such as ``transformers.pipeline("text-classification", ...)``.

    ``classify`` takes a list of texts and returns a {label, score} for each; a text to be written counts as toxic, the
    whole of it, where its label is one of ``labels`` with at least the ``threshold`` score.
    """
    if not 0 <= threshold <= 1:
        raise TextlocError(f"a classifier's threshold lies between 0 and 1, got {threshold}")

    def detect(prompt: str) -> list[Finding]:
        places = [(a, b) for a, b in _regions(prompt) if prompt[a:b].strip()]
        answers = classify([prompt[a:b] for a, b in places]) if places else []
        return [
            Finding(start=a, end=b, text=prompt[a:b], word=prompt[a:b])
            for (a, b), answer in zip(places, answers, strict=True)
            if answer["label"] in labels and answer["score"] >= threshold
        ]

    return detect


# --- the replacement ------------------------------------------------------------------------------------------


def harmless_word(word: str) -> str:
    """The harmless word for a toxic one: nearest in length, then with the fewest letters at the same place."""

    def fit(other: str) -> tuple[int, int]:
        return abs(len(other) - len(word)), sum(a == b for a, b in zip(other, word.upper(), strict=False))

    return min(HARMLESS, key=fit)


def clean(prompt: str, findings: Iterable[Finding], replace: Callable[[str], str] = harmless_word) -> str:
    """The prompt with a harmless word for each finding, in small letters where the toxic one was."""
    parts, end = [], 0
    for finding in findings:
        word = replace(finding.word)
        parts += [prompt[end : finding.start], word.lower() if finding.text.islower() else word]
        end = finding.end
    return "".join([*parts, prompt[end:]])


# --- how well it finds ----------------------------------------------------------------------------------------


def _between(word: str, rng: random.Random, gap: str) -> str:
    return gap.join(word)


def _repeated(word: str, rng: random.Random) -> str:
    at = rng.randrange(len(word))
    return word[:at] + word[at] * rng.randint(2, 4) + word[at + 1 :]


def _mapped(word: str, table: dict[str, str]) -> str:
    return "".join(table.get(c, c) for c in word)


_DIGITS = {"O": "0", "I": "1", "L": "1", "E": "3", "A": "4", "S": "5", "T": "7", "B": "8", "G": "9"}
_CYRILLIC = dict(zip("ABEKMHOPCTYXSIJ", "АВЕКМНОРСТУХЅІЈ", strict=True))


def _misspelt(word: str, rng: random.Random) -> str:
    """One letter left out, doubled by its neighbour, swapped or replaced, anywhere."""
    at, kind = rng.randrange(len(word)), rng.randrange(4)
    other = rng.choice([c for c in LETTERS if c != word[at]])
    swapped = word[:at] + word[at : at + 2][::-1] + word[at + 2 :]
    return (word[:at] + word[at + 1 :], word[:at] + other + word[at:], swapped, word[:at] + other + word[at + 1 :])[
        kind
    ]


#: Ways to disguise a word, from (word, rng); "split" goes over two quoted texts. All but the last three are undone.
DISGUISES: dict[str, Callable[[str, random.Random], str]] = {
    "plain": lambda word, rng: word,
    "small letters": lambda word, rng: word.lower(),
    "spaced": lambda word, rng: _between(word, rng, " "),
    "dotted": lambda word, rng: _between(word, rng, rng.choice(".-_*")),
    "repeated letter": _repeated,
    "digits": lambda word, rng: _mapped(word, _DIGITS),
    "look-alikes": lambda word, rng: _mapped(word, _CYRILLIC),
    "accents": lambda word, rng: unicodedata.normalize("NFC", _between(word, rng, "\u0301") + "\u0308"),
    "full width": lambda word, rng: "".join(chr(ord(c) + 0xFEE0) for c in word),
    "zero width": lambda word, rng: _between(word, rng, "\u200b"),
    "cut in two": lambda word, rng: f"{word[: len(word) // 2]} {word[len(word) // 2 :]}",
    "misspelt": _misspelt,
    "inside a word": lambda word, rng: f"{word}ISH",
    "split": lambda word, rng: f'{word[: len(word) // 2]}" and "{word[len(word) // 2 :]}',
}


def detection(
    detector: Detector, toxic: Sequence[tuple[str, str]], harmless: Sequence[tuple[str, str]], seed: int = 42
) -> pd.DataFrame:
    """How a detector does on (prompt, word) pairs: one row per prompt.

    Every toxic prompt comes once per disguise of DISGUISES. Columns: kind (a disguise, or "harmless"), prompt, word,
    toxic (what it is), found (what the detector says).
    """
    rng, rows = random.Random(seed), []
    for kind, disguise in DISGUISES.items():
        for prompt, word in toxic:
            # A word without a letter to disguise stays as it is; it is plain then.
            written = prompt.replace(f'"{word}"', f'"{disguise(word, rng)}"')
            if kind == "plain" or written != prompt:
                rows.append({"kind": kind, "prompt": written, "word": word, "toxic": True})
    rows += [{"kind": "harmless", "prompt": p, "word": w, "toxic": False} for p, w in harmless]
    return pd.DataFrame(rows).assign(found=[bool(detector(row["prompt"])) for row in rows])
