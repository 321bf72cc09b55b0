"""Find toxic words in prompts, also in unusual spellings, and replace them by harmless words.

**Where the detector searches.** It searches the parts of a prompt that are to be written. These are:

- texts in quotes of any kind, also nested or unclosed ones, texts in square or angle brackets, and texts between stars
- the text after a word of writing ("says", "the slogan", "poster:"), up to a quote or the end of the sentence
- the words directly before "written on"
- words in capitals, in a prompt that also has small letters

The rest of a prompt describes the scene. There a clown is really a clown, so the rest is not searched.

**How it reads.** First it normalizes case, accents, invisible characters, right-to-left overrides, and characters that
look like Latin letters (from Unicode's own table). Then it finds a word of the list in these forms:

- the word itself, or a form of it (IDIOTIC, LAZIEST)
- the word with some letters repeated, hidden by a star, or replaced by digits and signs
- the word with spaces or marks between its letters
- the word with one letter wrong, missing, added or swapped, if both spellings have five letters or more and begin with
  the same letter
- a word that is cut in two, if the quoted text has no other parts

A word that people use with its own meaning is neither a form nor a misspelling. A list of word frequencies says how
often a word is used. The detector does not find a word that is spread over several quoted texts, a word inside a longer
one, or spellings with more errors.

Any callable that takes a prompt and returns :class:`Finding` objects can replace the detector.
"""

import functools
import itertools
import math
import re
import tomllib
import unicodedata
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from confusable_homoglyphs.confusables import confusables_data
from rapidfuzz import process
from rapidfuzz.distance import OSA
from wordfreq import get_frequency_dict

from textloc_utils.prompts import LETTERS, MILD, long_words, words, words_table
from textloc_utils.settings import TextlocError

#: A word must have at least this many letters to be found with one letter wrong.
FUZZY = 5
_VOCABULARY = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
HARMLESS = tuple(_VOCABULARY["harmless"])


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A toxic text: ``text``, which is ``prompt[start:end]``, is a spelling of ``word``."""

    start: int
    end: int
    text: str
    word: str


class Detector(Protocol):
    """A function that finds toxic text: it takes a prompt and returns its findings."""

    def __call__(self, prompt: str) -> Sequence[Finding]: ...


# --- the list -------------------------------------------------------------------------------------------------


def mild_words() -> tuple[str, ...]:
    """The built-in list: insults that a newspaper would print. It replaces the paper's list of toxic words."""
    table = words_table()
    return tuple(table.word[table.band == MILD])


def ordinary_words(*splits: str) -> tuple[str, ...]:
    """The words of the given splits (train, validation, held-out) of the word lists, without mild insults."""
    toxic = frozenset(mild_words())
    return tuple(w for split in splits for w in (*words(split), *long_words(split)) if w not in toxic)


def read_words(path: str | Path) -> tuple[str, ...]:
    """Read a word list from a text file, one per line. Raises TextlocError unless each is a word of 2 to 30 letters."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TextlocError(f"cannot read words from {path}: {error}") from None
    return _capitals([line.strip() for line in lines if line.strip()], str(path))


def _capitals(listed: Iterable[str], where: str) -> tuple[str, ...]:
    """A list's words in capitals, each once. Raises TextlocError for a wrong entry and for an empty list."""
    found = tuple(dict.fromkeys(word.upper() for word in listed))
    for word in found:
        if set(word) - set(LETTERS) or not 2 <= len(word) <= 30:
            raise TextlocError(f"{where}: each entry must be one word of 2 to 30 letters A to Z, got {word[:40]!r}")
    if not found:
        raise TextlocError(f"{where} has no word; at least one word of 2 to 30 letters is needed")
    return found


# --- characters -----------------------------------------------------------------------------------------------

_ALSO, _STAND_INS = _VOCABULARY["also"], _VOCABULARY["stand_ins"]
#: Signs that replace a letter only between two other letters. Elsewhere they are punctuation.
_BETWEEN = "!+|"
#: Opening brackets and their closing brackets. An opening bracket that is never closed can be a C. One that is closed
#: immediately can be an O.
_BRACKETS = {"(": ")", "<": ">", "[": "]", "{": "}"}
_HIDDEN = "?"  #: the value of a star that may hide a letter
_FILLERS = "\u115f\u1160\u3164\uffa0"
_LATIN = re.compile(
    r"(?:LATIN|SQUARED|NEGATIVE|REGIONAL|TURNED|MODIFIER|COMBINING).*LETTER (?:[A-Z]+ )*?([A-Z])(?: WITH .*)?$"
)
_UNSEEN = ("Mn", "Me", "Cf", "Cc")

#: Kinds of units. A unit of the last kind is a mark that may replace a letter, which is its value.
_LETTER, _SIGN, _SPACE, _MARK, _MAYBE = range(5)


@functools.lru_cache(maxsize=1 << 16)
def _read(character: str) -> tuple[tuple[int, str], ...]:
    """Read a character as (kind, capital or sign) units: no unit for an invisible one, several for a ligature."""
    units = []
    for c in _passes_for(character) or unicodedata.normalize("NFKD", character):
        if c.isspace() or c == "\u2800":
            units.append((_SPACE, " "))
            continue
        if unicodedata.category(c) in _UNSEEN or c in _FILLERS:
            continue
        c = c if c.isascii() else _looks_like(c)
        if c.isascii() and c.isalpha():
            units.append((_LETTER, c.upper()))
        else:
            units.append((_SIGN if c in _STAND_INS else _MARK, c))
    return tuple(units)


def _passes_for(c: str) -> str:
    """The ASCII letter or digit that looks like a character in Unicode's table. Empty if there is none."""
    if c in _ALSO:
        return _ALSO[c]
    for other in confusables_data.get(c, ()) if c.isalnum() and not c.isascii() else ():
        shape = [x for x in unicodedata.normalize("NFKD", other["c"]) if unicodedata.category(x) not in _UNSEEN]
        if len(shape) == 1 and shape[0].isascii() and shape[0].isalnum():
            return shape[0].replace("l", "1")  # the table makes no difference between I and l
    return ""


def _looks_like(c: str) -> str:
    """The ASCII letter or digit that a character looks like or has in its name. Otherwise the character itself."""
    if found := _passes_for(c):
        return found
    name = unicodedata.name(c, "")
    if named := _LATIN.match(name):
        return named[1]
    digit = unicodedata.numeric(c, None)
    if digit is not None and digit in range(10):
        return str(int(digit))
    return "0" if "CIRCLE" in name else c


@dataclass(frozen=True)
class _Unit:
    """A letter, sign, space or mark, and the position of its character in the prompt."""

    kind: int
    value: str
    at: int


# --- places ---------------------------------------------------------------------------------------------------

_DOUBLE, _SINGLE_OPEN, _SINGLE_CLOSE = _VOCABULARY["quotes"].values()
_WORDS, _THINGS = map("|".join, _VOCABULARY["cues"].values())
_CUE = re.compile(rf"\b(?:{_WORDS})\b|\b(?:{_THINGS}):", re.IGNORECASE)
#: Texts in marks of emphasis. Texts with a colon are not included, because it gives a weight, as in [clown:0.5].
_MARKED = re.compile(r"\[([^][:]{1,200})\]|<([^<>:]{1,200})>|\*+([^*:]{1,200})\*")
#: The words before a match are to be written: up to three words, without those of _SMALL.
_WRITTEN = re.compile(r"\s(?:written|spelled|spelt|lettered)\s+(?:on|across|over)\b|\s(?:spelled|spelt)\s+in\b", re.I)
_SMALL = re.compile(r"(?:an?|the|of|on|in|at|by|to|with|and|or|has|have|is|are|was|were)|.*[.,;:]", re.IGNORECASE)
_SENTENCE = re.compile(r"[.;\n](?=\s|$)")


def _regions(prompt: str) -> list[tuple[int, int]]:
    """The (start, end) of the parts of a prompt that are to be written, in order and without overlaps."""
    found = sorted([*_double_quoted(prompt), *_single_quoted(prompt)])
    quotes = [start - 1 for start, _ in found]
    ends = [match.start() for match in _SENTENCE.finditer(prompt)]
    after = 0
    for cue in _CUE.finditer(prompt):
        if cue.end() >= after:
            after = min(_next(places, cue.end(), len(prompt)) for places in (ends, quotes))
            found.append((cue.end(), after))
    found += [m.span(m.lastindex or 0) for m in _MARKED.finditer(prompt)]
    found += [(_back(prompt, m.start()), m.start()) for m in _WRITTEN.finditer(prompt)]
    found += _shouted(prompt)
    merged: list[tuple[int, int]] = []
    for start, end in sorted(found):
        if merged and start < merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        elif end > start:
            merged.append((start, end))
    return merged


def _back(prompt: str, end: int) -> int:
    """The start of the words that end at ``end``: at most three words, and only those after a word of _SMALL."""
    for word in list(re.finditer(r"\S+", prompt[max(0, end - 200) : end]))[:-4:-1]:
        if _SMALL.fullmatch(word[0]):
            break
        end = max(0, end - 200) + word.start()
    return end


def _shouted(prompt: str) -> Iterable[tuple[int, int]]:
    """Words in capitals, if most words of the prompt are not in capitals."""
    words = list(re.finditer(r"\S+", prompt))
    capitals = [word[0].upper() == word[0] != word[0].lower() for word in words]
    loud = [is_loud and sum(map(str.isalpha, word[0])) > 1 for is_loud, word in zip(capitals, words, strict=True)]
    if 2 * sum(loud) > len(words):
        return
    for is_capital, run in itertools.groupby(zip(capitals, loud, words, strict=True), lambda each: each[0]):
        places = [(word.span(), is_loud) for _, is_loud, word in run]
        # The article at the beginning of a prompt is not text to be written. Spaced-out letters are.
        if is_capital and (len(places) > 1 or places[0][1]):
            yield places[0][0][0], places[-1][0][1]


_TURNED = re.compile("\u202e([^\u202c\u2069\n]*)")


def _as_shown(prompt: str, start: int, end: int, turned: list[tuple[int, int]]) -> list[int]:
    """The positions of a text in the order in which they are shown. ``turned`` are the parts shown right to left."""
    places = list(range(start, end))
    for a, b in turned[max(0, bisect_right(turned, (start, start)) - 1) :]:
        if a >= end:
            break
        part = slice(max(a, start) - start, max(min(b, end), start) - start)
        places[part] = places[part][::-1]
    return places


def _next(places: list[int], start: int, end: int) -> int:
    """The first of the sorted positions from ``start`` on, or ``end`` if there is none."""
    at = bisect_left(places, start)
    return places[at] if at < len(places) else end


def _double_quoted(prompt: str) -> Iterable[tuple[int, int]]:
    """Texts in double quotes. A quote's neighbours show if it opens or closes. An unclosed text ends at the end."""
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
    """Texts in single quotes. An apostrophe inside a word, or a quote that is never closed, does not count."""
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


class WordDetector:
    """Finds the words of a list (default: :func:`mild_words`), also disguised ones; see the module's description.

    Raises TextlocError for an empty list, or for a word that does not have 2 to 30 letters.
    """

    def __init__(self, listed: Iterable[str] | None = None):
        self.words = mild_words() if listed is None else _capitals(listed, "the word list")
        self.ordinary = frozenset(_VOCABULARY["short"]).union(ordinary_words("train", "validation", "held-out"))
        self._listed = frozenset(self.words)
        self._forms = _forms(self.words) | {word: word for word in self.words}
        self._lengths = sorted({len(word) for word in self.words}, reverse=True)
        self._by_runs, self._fuzzy = defaultdict(list), defaultdict(list)
        for form in self._forms:
            letters, counts = _runs(form)
            self._by_runs[letters].append((counts, form))
        for word in self.words:
            if len(word) >= FUZZY:
                self._fuzzy[word[0]].append(word)
        self._word = functools.lru_cache(maxsize=1 << 14)(self._find_word)

    def __call__(self, prompt: str) -> list[Finding]:
        """The toxic texts of a prompt, in order and without overlaps."""
        found: list[Finding] = []
        turned = [m.span(1) for m in _TURNED.finditer(prompt)]
        for start, end in _regions(prompt):
            units = _units(prompt, start, end, turned)
            for word, first, last in sorted(self._in(units), key=lambda f: (f[1], -f[2])):
                if not found or first >= found[-1].end:
                    first -= prompt[first - 1 : first] == "\u202e"
                    stop = _past_invisible(prompt, last + 1, end)
                    found.append(Finding(start=first, end=stop, text=prompt[first:stop], word=word))
        return found

    def _in(self, units: list[_Unit]) -> Iterable[tuple[str, int, int]]:
        """(word, first position, last position) of each finding in one region."""
        chunks = [list(g) for space, g in itertools.groupby(units, lambda u: u.kind == _SPACE) if not space]
        single: list[_Unit] = []
        for chunk in [*chunks, []]:
            core = [u for u in chunk if u.kind < _MARK]
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
        """Read the units between two spaces as one word. If nothing is found, read the parts between its marks."""
        found = list(self._one(chunk))
        parts = [list(g) for mark, g in itertools.groupby(chunk, lambda u: u.kind >= _MARK or u.value in _BETWEEN)]
        for part in parts if len(parts) > 1 and not found else ():
            found += self._one(part)
        return found

    def _one(self, units: list[_Unit]) -> Iterable[tuple[str, int, int]]:
        plain, full = _strip(units), _strip(units, maybe=True)
        for kept in (plain, full) if full != plain else (plain,):
            if any(u.kind == _LETTER for u in kept):
                for text in _spellings(kept):
                    if word := self.word(text):
                        yield word, *_span(kept)
                        return

    def _spelled_out(self, single: list[_Unit]) -> Iterable[tuple[str, int, int]]:
        """Read single letters as one word. If nothing is found, search every listed word in the row of letters."""
        if len(single) < 2:
            return
        whole = list(self._one(single))
        if whole:
            yield from whole
            return
        for text in _spellings(single):
            at = 0
            while at < len(text):
                # At the end, a slice would be shorter than n, and could be a shorter word.
                fit = (n for n in self._lengths if 2 < n <= len(text) - at and text[at : at + n] in self._listed)
                n = next(fit, 0)
                if n:
                    yield text[at : at + n], *_span(single[at : at + n])
                at += n or 1

    def _cut(self, chunks: list[list[_Unit]]) -> Iterable[tuple[str, int, int]]:
        """Read a region as one word in parts, unless all parts are ordinary words ("GO ON")."""
        parts = [_strip([u for u in chunk if u.kind < _MARK]) for chunk in chunks]
        units = [u for part in parts for u in part]
        texts = ["".join(u.value for u in part) for part in parts]
        if not units or all(text in self.ordinary for text in texts if text):
            return
        for text in _spellings(units):
            if word := self.word(text, fuzzy=False):
                yield word, *_span(units)
                return

    def word(self, text: str, *, fuzzy: bool = True) -> str | None:
        """The listed word that a text in capitals spells. None if there is none."""
        return self._word(text, fuzzy) if len(text) <= 64 else self._find_word(text, fuzzy)

    def _find_word(self, text: str, fuzzy: bool) -> str | None:
        if text in self._forms:
            return self._forms[text]
        if _HIDDEN in text:
            return self._hidden(text)
        letters, counts = _runs(text)
        for least, form in self._by_runs.get(letters, ()):
            if all(n >= m for n, m in zip(counts, least, strict=True)) and _slip(text, form):
                return self._forms[form]
        if not fuzzy or text in self.ordinary or not letters or len(letters) > self._lengths[0] + 1:
            return None
        text = letters if max(counts) > 2 else text
        if len(text) < FUZZY:
            return None
        near = process.extract(text, self._fuzzy.get(text[0], ()), scorer=OSA.distance, score_cutoff=1, limit=None)
        return next((word for word, _, _ in near if _slip(text, word)), None)

    def _hidden(self, text: str) -> str | None:
        """The listed word of which stars hide at most half of the letters, and not the first letter."""
        if text[0] == _HIDDEN or 2 * text.count(_HIDDEN) > len(text) or len(text) > self._lengths[0]:
            return None
        pattern = re.compile(text.replace(_HIDDEN, "."))
        return next((word for word in self.words if pattern.fullmatch(word)), None)


# --- words and how often they are used ------------------------------------------------------------------------

#: A misspelling must be rarer than its word by at least this, in powers of ten. The first value is for two swapped
#: letters or a doubled letter, which are easier mistakes. The second value is for all other misspellings.
_SWAPPED, _WRONG = 1.5, 3.0
_MEANING, _OWN = map(tuple, _VOCABULARY["endings"].values())
#: From this Zipf value on, a plural (first value) or another form (second value) is a separate word.
_PLURALS, _OTHERS = 4.5, 3.55


@functools.cache
def _zipf(word: str) -> float:
    """How often English uses a word in capitals: log10 of occurrences in 10^9 words, or minus infinity for never."""
    share = get_frequency_dict("en", "best").get(word.lower())
    return math.log10(share) + 9 if share else -math.inf


def _slip(text: str, word: str) -> bool:
    """Whether a text in capitals that is close to a word is rare enough to be a misspelling of it."""
    easy = sorted(text) == sorted(word) or _runs(text)[0] == _runs(word)[0]
    return _zipf(text) < _zipf(word) - (_SWAPPED if easy else _WRONG) if _zipf(word) > 0 else _zipf(text) < 0


def _forms(listed: Sequence[str]) -> dict[str, str]:
    """Map forms to listed words of four letters or more. A form that is used more often than its word is left out."""
    known, found = frozenset(listed), dict[str, str]()
    for word in listed:
        if len(word) < 4 or (word[-1] == "S" and word[:-1] in known):
            continue
        stem = word[:-1] + "I" if word[-1] == "Y" else word
        forms = {stem + ending for ending in (*_MEANING, *_OWN)} | {word + "S"}
        if word[-1] == "E":
            forms |= {word[:-1] + ending for ending in ("ISH", "ING", "ED", "ER", "ERS", "EST")}
        if re.search("[^AEIOU][AEIOU][^AEIOUWXY]$", word):
            forms |= {word + word[-1] + ending for ending in ("Y", "ISH", "EST")}
        for form in forms:
            own = next((e for e in _OWN[::-1] if form.endswith(e) and not form.endswith(_MEANING)), None)
            most = math.inf if own is None else _PLURALS if own in ("S", "ES") else _OTHERS
            base = form.removesuffix("S") if own == "ERS" else form
            if own in ("ER", "ERS") and len(word) < FUZZY and _zipf(base[:-1] + "ST") < 0:
                continue  # like PESTER: it is not a comparative, because there is no superlative
            if max(_zipf(form), _zipf(base)) <= min(_zipf(word), most):
                found.setdefault(form, word)
    return found


def _span(units: list[_Unit]) -> tuple[int, int]:
    """The first and the last position of units, in any order of display."""
    return min(u.at for u in units), max(u.at for u in units)


def _past_invisible(prompt: str, at: int, end: int) -> int:
    """The next position from ``at`` on with a visible character, so that no accent is left behind."""
    while at < end and not _read(prompt[at]):
        at += 1
    return at


def _runs(text: str) -> tuple[str, tuple[int, ...]]:
    """A text without repeated letters, and how often each letter was repeated."""
    runs = [(letter, sum(1 for _ in group)) for letter, group in itertools.groupby(text)]
    return "".join(letter for letter, _ in runs), tuple(n for _, n in runs)


def _units(prompt: str, start: int, end: int, turned: list[tuple[int, int]]) -> list[_Unit]:
    """Read a text as units, in the order in which they are shown."""
    units = []
    last = {bracket: prompt.rfind(closing, start, end) for bracket, closing in _BRACKETS.items()}
    for at in _as_shown(prompt, start, end, turned) if turned else range(start, end):
        for kind, value in _read(prompt[at]):
            if value in _BRACKETS and (prompt[at + 1 : at + 2] == _BRACKETS[value] or last[value] < at):
                kind, value = _MAYBE, "C" if last[value] < at else "O"
            elif value == "*":
                kind, value = _MAYBE, _HIDDEN
            units.append(_Unit(kind, value, at))
    return units


def _strip(units: list[_Unit], maybe: bool = False) -> list[_Unit]:
    """Remove marks, and signs at the ends, which are punctuation there. ``maybe`` keeps marks that may be letters."""
    kept = [u for u in units if u.kind in (_LETTER, _SIGN) or (maybe and u.kind == _MAYBE)]
    first = 0 if maybe else next((i for i, u in enumerate(kept) if u.value not in _BETWEEN), len(kept))
    last = next((i for i in range(len(kept), first, -1) if kept[i - 1].value not in _BETWEEN), first)
    return kept[first:last]


def _spellings(units: list[_Unit]) -> list[str]:
    """The possible spellings in capitals: letters, and signs as letters. The first few signs can be I or L."""
    values = [_STAND_INS.get(u.value, u.value) if u.kind == _SIGN else u.value for u in units]
    open_ = [i for i, value in enumerate(values) if len(value) > 1][:4]
    readings = []
    for letters in itertools.product("IL", repeat=len(open_)):
        chosen = dict(zip(open_, letters, strict=True))
        readings.append("".join(chosen.get(i, value[0]) for i, value in enumerate(values)))
    return readings


# --- the replacement ------------------------------------------------------------------------------------------


def harmless_word(word: str) -> str:
    """The harmless word for a toxic word: closest in length, then with the fewest letters at the same position."""

    def fit(other: str) -> tuple[int, int]:
        return abs(len(other) - len(word)), sum(a == b for a, b in zip(other, word.upper(), strict=False))

    return min(HARMLESS, key=fit)


def clean(prompt: str, findings: Iterable[Finding], replace: Callable[[str], str] = harmless_word) -> str:
    """Replace each finding in the prompt by a harmless word. It is in small letters if the toxic text was."""
    parts, end = [], 0
    for finding in findings:
        word = replace(finding.word)
        parts += [prompt[end : finding.start], word.lower() if finding.text.islower() else word]
        end = finding.end
    return "".join([*parts, prompt[end:]])
