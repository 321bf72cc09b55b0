"""Toxic words in prompts: find them, however they are spelled, and put a harmless word in their place.

**Where it looks.** In what the prompt asks to be written: texts in quotes of any kind, nested or left open, in square
or angle brackets or between stars; outside them whatever follows a word of writing ("says", "the slogan", "poster:")
up to a quote or the end of the sentence, what stands right before "written on", and words in capitals in a prompt that
has small letters. The rest of a prompt describes the scene, where a clown is a clown: it is left alone.

**How it reads.** Case, accents, invisible characters, right-to-left overrides and characters that look like Latin
letters (by Unicode's own table) are undone first. Then a word counts as one of the list if it is that word or a form of
it (IDIOTIC, LAZIEST); with any of its letters repeated, hidden by a star, or replaced by digits and signs; with spaces
or marks between its letters; or with one letter wrong, left out, added or swapped, if both have five letters or more
and begin with the same letter. A word that people use for itself is neither a form nor a misspelling: a list of word
frequencies tells how often they do. A word cut in two counts when the quoted text is nothing but its parts. Not found:
a word spread over several quoted texts, a word inside a longer one, and spellings further off.

Any callable that takes a prompt and returns :class:`Finding` objects can take the detector's place.
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

#: Least number of letters of a word that is found with a letter wrong.
FUZZY = 5
_VOCABULARY = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
HARMLESS = tuple(_VOCABULARY["harmless"])


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

_ALSO, _STAND_INS = _VOCABULARY["also"], _VOCABULARY["stand_ins"]
#: Signs that stand for a letter between two others only: elsewhere they are punctuation.
_BETWEEN = "!+|"
#: Opening brackets that can be a C, with what closes them, which they then lack; closed at once they are an O.
_BRACKETS = {"(": ")", "<": ">", "[": "]", "{": "}"}
_HIDDEN = "?"  #: the value of a star that may hide a letter
_FILLERS = "\u115f\u1160\u3164\uffa0"
_LATIN = re.compile(
    r"(?:LATIN|SQUARED|NEGATIVE|REGIONAL|TURNED|MODIFIER|COMBINING).*LETTER (?:[A-Z]+ )*?([A-Z])(?: WITH .*)?$"
)
_UNSEEN = ("Mn", "Me", "Cf", "Cc")

#: A mark of the last kind may stand for a letter, its value.
_LETTER, _SIGN, _SPACE, _MARK, _MAYBE = range(5)


@functools.lru_cache(maxsize=1 << 16)
def _read(character: str) -> tuple[tuple[int, str], ...]:
    """A character as (kind, capital or sign) units: none for an invisible one, several for a ligature."""
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
    """The letter or digit of ASCII that Unicode's table calls a look-alike of a character; empty if there is none."""
    if c in _ALSO:
        return _ALSO[c]
    for other in confusables_data.get(c, ()) if c.isalnum() and not c.isascii() else ():
        shape = [x for x in unicodedata.normalize("NFKD", other["c"]) if unicodedata.category(x) not in _UNSEEN]
        if len(shape) == 1 and shape[0].isascii() and shape[0].isalnum():
            return shape[0].replace("l", "1")  # the table calls I and l the same
    return ""


def _looks_like(c: str) -> str:
    """The letter or digit of ASCII that a character looks like or is named by; the character itself without one."""
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
    """A letter, sign, space or mark, and the place of its character in the prompt."""

    kind: int
    value: str
    at: int


# --- places ---------------------------------------------------------------------------------------------------

_DOUBLE, _SINGLE_OPEN, _SINGLE_CLOSE = _VOCABULARY["quotes"].values()
_WORDS, _THINGS = map("|".join, _VOCABULARY["cues"].values())
_CUE = re.compile(rf"\b(?:{_WORDS})\b|\b(?:{_THINGS}):", re.IGNORECASE)
#: Texts in marks of emphasis; a colon is that of a weight, as in [clown:0.5].
_MARKED = re.compile(r"\[([^][:]{1,200})\]|<([^<>:]{1,200})>|\*+([^*:]{1,200})\*")
#: What stands before it is written: up to three words, none of them of _SMALL.
_WRITTEN = re.compile(r"\s(?:written|spelled|spelt|lettered)\s+(?:on|across|over)\b|\s(?:spelled|spelt)\s+in\b", re.I)
_SMALL = re.compile(r"(?:an?|the|of|on|in|at|by|to|with|and|or|has|have|is|are|was|were)|.*[.,;:]", re.IGNORECASE)
_SENTENCE = re.compile(r"[.;\n](?=\s|$)")


def _regions(prompt: str) -> list[tuple[int, int]]:
    """The (start, end) of what the prompt asks to be written, in order and apart from each other."""
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
    """Where the words begin that end at ``end``: three at most, back to a word of _SMALL."""
    for word in list(re.finditer(r"\S+", prompt[max(0, end - 200) : end]))[:-4:-1]:
        if _SMALL.fullmatch(word[0]):
            break
        end = max(0, end - 200) + word.start()
    return end


def _shouted(prompt: str) -> Iterable[tuple[int, int]]:
    """Words in capitals, in a prompt most of whose words are not."""
    words = list(re.finditer(r"\S+", prompt))
    capitals = [word[0].upper() == word[0] != word[0].lower() for word in words]
    loud = [is_loud and sum(map(str.isalpha, word[0])) > 1 for is_loud, word in zip(capitals, words, strict=True)]
    if 2 * sum(loud) > len(words):
        return
    for is_capital, run in itertools.groupby(zip(capitals, loud, words, strict=True), lambda each: each[0]):
        places = [(word.span(), is_loud) for _, is_loud, word in run]
        # The article that begins a prompt is no text; letters spaced out are.
        if is_capital and (len(places) > 1 or places[0][1]):
            yield places[0][0][0], places[-1][0][1]


_TURNED = re.compile("\u202e([^\u202c\u2069\n]*)")


def _as_shown(prompt: str, start: int, end: int, turned: list[tuple[int, int]]) -> list[int]:
    """The places of a text in the order in which they are shown; ``turned`` are those shown from right to left."""
    places = list(range(start, end))
    for a, b in turned[max(0, bisect_right(turned, (start, start)) - 1) :]:
        if a >= end:
            break
        part = slice(max(a, start) - start, max(min(b, end), start) - start)
        places[part] = places[part][::-1]
    return places


def _next(places: list[int], start: int, end: int) -> int:
    """The first of the places (in order) from ``start`` on, ``end`` if there is none."""
    at = bisect_left(places, start)
    return places[at] if at < len(places) else end


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


class WordDetector:
    """Finds the words of a list (default: :func:`mild_words`), also in disguise; see the module's description.

    Raises TextlocError for a list without words, or with one that is not of 2 to 30 letters.
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
        """The toxic texts of a prompt, in order, apart from each other."""
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
        """(word, first place, last place) of what one region holds."""
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
        """What stands between two spaces: as one word, else the parts between its marks."""
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
                    yield text[at : at + n], *_span(single[at : at + n])
                at += n or 1

    def _cut(self, chunks: list[list[_Unit]]) -> Iterable[tuple[str, int, int]]:
        """A region that is nothing but one word in parts, which are not ordinary words all of them ("GO ON")."""
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
        """The listed word that some capitals spell; None if there is none."""
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
        """The listed word of which stars leave half of the letters or more, the first among them."""
        if text[0] == _HIDDEN or 2 * text.count(_HIDDEN) > len(text) or len(text) > self._lengths[0]:
            return None
        pattern = re.compile(text.replace(_HIDDEN, "."))
        return next((word for word in self.words if pattern.fullmatch(word)), None)


# --- words and how often they are used ------------------------------------------------------------------------

#: How much rarer than a word its misspelling is at least, in powers of ten: one by a letter swapped with the next or
#: written twice, which slips in more easily, and any other.
_SWAPPED, _WRONG = 1.5, 3.0
_MEANING, _OWN = map(tuple, _VOCABULARY["endings"].values())
#: Zipf value from which on a plural, and another form, is a word of its own.
_PLURALS, _OTHERS = 4.5, 3.55


@functools.cache
def _zipf(word: str) -> float:
    """How often English uses some capitals, log10 of occurrences in 10^9 words; minus infinity for never."""
    share = get_frequency_dict("en", "best").get(word.lower())
    return math.log10(share) + 9 if share else -math.inf


def _slip(text: str, word: str) -> bool:
    """Whether capitals that are nearly a word are rare enough beside it to be its misspelling."""
    easy = sorted(text) == sorted(word) or _runs(text)[0] == _runs(word)[0]
    return _zipf(text) < _zipf(word) - (_SWAPPED if easy else _WRONG) if _zipf(word) > 0 else _zipf(text) < 0


def _forms(listed: Sequence[str]) -> dict[str, str]:
    """Forms of the listed words of four letters or more, by the word: what is used more often than it is none."""
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
                continue  # PESTER; a comparative has a superlative
            if max(_zipf(form), _zipf(base)) <= min(_zipf(word), most):
                found.setdefault(form, word)
    return found


def _span(units: list[_Unit]) -> tuple[int, int]:
    """The first and the last place of what was read, in whatever order it is shown."""
    return min(u.at for u in units), max(u.at for u in units)


def _past_invisible(prompt: str, at: int, end: int) -> int:
    """The next place from ``at`` on that shows, so that no accent is left behind."""
    while at < end and not _read(prompt[at]):
        at += 1
    return at


def _runs(text: str) -> tuple[str, tuple[int, ...]]:
    """A text without repetitions, and how often each of its letters was repeated."""
    runs = [(letter, sum(1 for _ in group)) for letter, group in itertools.groupby(text)]
    return "".join(letter for letter, _ in runs), tuple(n for _, n in runs)


def _units(prompt: str, start: int, end: int, turned: list[tuple[int, int]]) -> list[_Unit]:
    """What a text is read as, in the order in which it is shown."""
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
    """Without marks, and without signs at the ends that are punctuation there; ``maybe``: with what may be letters."""
    kept = [u for u in units if u.kind in (_LETTER, _SIGN) or (maybe and u.kind == _MAYBE)]
    first = 0 if maybe else next((i for i, u in enumerate(kept) if u.value not in _BETWEEN), len(kept))
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
