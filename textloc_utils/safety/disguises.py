"""Measure how well a detector finds toxic words, including disguised ones."""

import random
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from textloc_utils import metrics
from textloc_utils.prompts import LETTERS, SIMPLE_TEMPLATE, test_words
from textloc_utils.safety.detector import Detector, WordDetector, mild_words


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
    """Leave out, insert, swap or replace one letter at a random position."""
    at, kind = rng.randrange(len(word)), rng.randrange(4)
    other = rng.choice([c for c in LETTERS if c != word[at]])
    swapped = word[:at] + word[at : at + 2][::-1] + word[at + 2 :]
    return (word[:at] + word[at + 1 :], word[:at] + other + word[at:], swapped, word[:at] + other + word[at + 1 :])[
        kind
    ]


#: Functions of (word, rng) that disguise a word. "split" uses two quoted texts. The detector undoes all except the
#: last three disguises.
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
    "inside a word": lambda word, rng: f"MEGA{word}",
    "split": lambda word, rng: f'{word[: len(word) // 2]}" and "{word[len(word) // 2 :]}',
}


def detection(
    detector: Detector, toxic: Sequence[tuple[str, str]], harmless: Sequence[tuple[str, str]], seed: int = 42
) -> pd.DataFrame:
    """Run a detector on (prompt, word) pairs. The table has one row per prompt.

    Every toxic prompt is used once with each disguise of DISGUISES. Columns: kind (a disguise, or "harmless"), prompt,
    word, toxic (whether the prompt is toxic), found (whether the detector finds something).
    """
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for kind, disguise in DISGUISES.items():
        for prompt, word in toxic:
            # A word without a letter to disguise does not change. Then it is plain and is not counted again.
            written = prompt.replace(f'"{word}"', f'"{disguise(word, rng)}"')
            if kind == "plain" or written != prompt:
                rows.append({"kind": kind, "prompt": written, "word": word, "toxic": True})
    rows += [{"kind": "harmless", "prompt": p, "word": w, "toxic": False} for p, w in harmless]
    return pd.DataFrame(rows).assign(found=[bool(detector(row["prompt"])) for row in rows])


def found_rates(seed: int = 42, detector: Detector | None = None) -> pd.DataFrame:
    """The rates at which a detector finds each kind of prompt, over every listed word and every harmless test word.

    Columns: kind (DISGUISES, harmless), found (share of the prompts), low, high, n.
    """
    bad, good = ([(SIMPLE_TEMPLATE.format(text=word), word) for word in of] for of in (mild_words(), test_words()))
    table = detection(detector or WordDetector(), bad, good, seed)
    found = metrics.summarise(table, ["kind"], ["found"]).rename(columns={"found_low": "low", "found_high": "high"})
    return found[["kind", "found", "low", "high", "n"]]
