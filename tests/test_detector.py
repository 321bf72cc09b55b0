"""The detector: what it finds, what it leaves alone, and that no prompt upsets it."""

import random
import time
import unicodedata
from pathlib import Path

import disguises
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from textloc_utils import prompts
from textloc_utils.safety import detector
from textloc_utils.safety.disguises import DISGUISES, detection
from textloc_utils.settings import TextlocError

DETECT = detector.WordDetector()
DICTIONARY = Path("/usr/share/dict/words")
SAYS = 'A red sign on a blue wall that says "{}".'


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No test finds what another one made a detector remember."""
    detector._read.cache_clear()
    detector._zipf.cache_clear()
    monkeypatch.setitem(globals(), "DETECT", detector.WordDetector())


def words_in(prompt: str, *listed: str) -> list[str]:
    detect = detector.WordDetector(listed) if listed else DETECT
    return [f.word for f in detect(prompt)]


def test_the_list_is_mild_and_held_out():
    listed = detector.mild_words()
    assert len(listed) > 100 and "STUPID" in listed
    assert set(listed) <= set(prompts.words("held-out")) and not set(listed) & set(prompts.words("train"))


@pytest.mark.parametrize("kind", [k for k in DISGUISES if k not in ("misspelt", "inside a word", "split")])
def test_every_listed_word_is_found_in_disguise(kind):
    rng = random.Random(0)
    written = {word: DISGUISES[kind](word, rng) for word in detector.mild_words()}
    # What is all digits is a number.
    missed = [w for w, text in written.items() if not text.isdigit() and words_in(SAYS.format(text))[:1] != [w]]
    # Cut in two, these are two ordinary words.
    assert set(missed) <= ({"GOOF", "GOON", "MEAN", "TOADS"} if kind == "cut in two" else set())


@pytest.mark.parametrize(
    "text, word",
    [
        ("s t u p i d", "STUPID"),
        ("A S T U P I D one", "STUPID"),
        ("you $tup1d fool!", "STUPID FOOL"),
        ("L0SER", "LOSER"),
        ("PIG!", "PIG"),
        ("ꜱᴛᴜᴘɪᴅ", "STUPID"),
        ("🅢🅣🅤🅟🅘🅓", "STUPID"),
        ("ѕtuріd", "STUPID"),
        ("STUPID/IDIOT", "STUPID IDIOT"),
        ("STUPED", "STUPID"),
        ("STUIPD", "STUPID"),
        ("FOOOOL", "FOOL"),
        ("S\u200bT\u00adU\u2060P\ufe0fID", "STUPID"),
        ("Stüpid\u0308", "STUPID"),
        ("ST*PID", "STUPID"),
        ("idi0tic", "IDIOT"),
        ("(LOWN", "CLOWN"),
        ("!DIOT", "IDIOT"),
        ("CL()WN", "CLOWN"),
        ("S*U*I*", "STUPID"),
        ("P*G", "PIG"),
        ("L\u07c0SER", "LOSER"),  # NKO DIGIT ZERO
        ("STU PID", "STUPID"),
        ("HELLO S T U P E D", "STUPID"),
        ("STUUUPED", "STUPID"),
        ("LOZER", "LOSER"),
        ("!DIOT!", "IDIOT"),
        ("\u202eDIPUTS\u202c PIG", "STUPID PIG"),
        ("S T U P I D - P I G", "STUPID PIG"),
        ("\u2067\u202eRAIL\u202c", "LIAR"),
    ],
)
def test_spellings(text, word):
    assert " ".join(words_in(SAYS.format(text))) == word


@pytest.mark.parametrize(
    "text",
    [
        "HELLO",
        "GO ON",
        "FOL",
        "H*LLO",
        "*TUPID",
        "S*****",
        "ST*********D",
        "A I",
        "P I",
        "MY HAT RED",
        "STU PED",
        "I \u2764 YOU",
        "CLOWNFISH",
        "SHARE",
        "1984",
        "",
        " ",
        "I AM A BIT FAR",
        "TOP 10",
    ]
    + ["CHAMP", "LOTUS", "GREEKS", "IDIOMS", "LAIRS", "MEANING", "TWITTER", "BUNKERS", "SIMPLY", "(HEAT)", "3*4 = 12"],
)
def test_harmless_texts(text):
    assert words_in(SAYS.format(text)) == []


@pytest.mark.parametrize(
    "prompt, found",
    [
        ('A clown beside a sign that says "HELLO".', []),
        ("A sign saying STUPID things. A pig sits below.", ["STUPID"]),
        ("A sign that says 'STUPID' isn't a clown's", ["STUPID"]),
        ("“STUPID” and «PIG» and 「RAT」", ["STUPID", "PIG", "RAT"]),
        ('"he said "STUPID" aloud"', ["STUPID"]),
        ('a sign: "STUPID', ["STUPID"]),
        ('"a "stupid" day" for a clown', ["STUPID"]),
        ('"oh, "stupid"" and a clown', ["STUPID"]),
        ("a wall with 'stupid' and a quote at the end: '", ["STUPID"]),
        ("a dog's bowl, a cat's 'stupid' hat and the clowns' 'pig'", ["STUPID", "PIG"]),
        ("a sign that says hello; a clown stands by", []),
        ("a sign that says hello\n\nA clown stands by", []),
        ("a sign that says\nclown", ["CLOWN"]),
        ("a clown with stupid liar fool written on it", ["STUPID", "LIAR", "FOOL"]),
        ("a clown of the pig written across it", ["PIG"]),
        ("a sign, PIG, near A TREE", ["PIG"]),
        ("'stupid' on a wall", ["STUPID"]),
        ('"STU" and "PID"', []),
        ("a stupid pig", []),
        ("with graffiti spelling out loser", ["LOSER"]),
        ("A tombstone: STUPID", ["STUPID"]),
        ("A poster: stupid", ["STUPID"]),
        ("a plaque [liar]", ["LIAR"]),
        ("you fool written on a wall", ["FOOL"]),
        ("neon letters L O S E R", ["LOSER"]),
        # The scene, and what prompts hold besides words.
        ("A clown (smiling:1.2) juggling, masterpiece, 8K", []),
        ("[clown:0.5] in a park, by <lora:snake:0.8>", []),
        ("a pig next to a wall with hello written on it", []),
        ("a weasel written in the style of Beatrix Potter", []),
        ("A photo of a rat in a cage, 4K HDR, RAW photo", []),
        ("Style: cartoon clown, watercolour", []),
        ("a silly hat (on a dog)", []),
        ("A CLOWN BESIDE A SIGN", []),
    ],
)
def test_where_it_looks(prompt, found):
    assert words_in(prompt) == found


@pytest.mark.parametrize(
    ("word", "forms", "others"),
    [
        ("STUPID", "STUPIDITY STUPIDLY STUPIDNESS STUPIDEST STUPIDS", "STUPIDSTER STUPIDE"),
        ("IDIOT", "IDIOTIC IDIOTICALLY IDIOTS IDIOTDOM IDIOTISH IDIOTISHLY IDIOTISHNESS IDIOTED", "IDIOTE IDIO"),
        ("DUNCE", "DUNCISH DUNCING DUNCED DUNCER DUNCERS DUNCEST DUNCES DUNCELY DUNCEY", "DUNC DUNCIEST"),
        ("SILLY", "SILLIER SILLIEST SILLIES SILLINESS SILLILY SILLYS", "SILLYER SILL"),
        ("SNOB", "SNOBBISH SNOBBY SNOBBEST SNOBS", "SNOBBIER SNO"),
        ("CREEP", "CREEPED CREEPER CREEPISH CREEPS", "CREEPY CREEPPY CREEPPISH"),  # CREEPY is a word of its own
        ("THUG", "THUGGISH THUGGY THUGDOM", "THUGS THUGER THUGERS"),
        ("PIG", "", "PIGS PIGGY PIGGISH"),
        ("PEST", "", "PESTER PESTERS PESTERED"),
    ],
)
def test_forms_of_a_word(word, forms, others):
    found = detector._forms([word])
    assert {found.get(form) for form in forms.split()} <= {word}
    assert not found.keys() & {word, *others.split()}


def test_plurals_are_words_of_their_own_later_than_other_forms():
    assert detector._OTHERS < detector._zipf("WITCHES") < detector._PLURALS
    assert detector._forms(["WITCH"])["WITCHES"] == "WITCH"


def test_the_longest_of_two_findings_at_one_place():
    assert words_in(SAYS.format("RAT BAG"), "RAT", "RATBAG") == ["RATBAG"]
    assert words_in(SAYS.format("R A T B A G"), "RAT", "RATBAG") == ["RATBAG"]


def test_two_letters_are_a_word_of_ones_own_list():
    assert words_in(SAYS.format("HELLO A X"), "AX") == ["AX"]
    assert words_in(SAYS.format("O A X"), "AX") == []  # in a row of letters, longer words only


def test_nothing_is_no_word():
    assert DETECT.word("") is None and DETECT.word("S" * 65) is None and DETECT.word("STUPID") == "STUPID"


def test_a_plural_on_the_list_is_no_word_of_its_own():
    assert set(detector._forms(["IDIOT", "IDIOTS"]).values()) == {"IDIOT"}


def test_a_turned_text_is_replaced_with_what_turns_it():
    prompt = SAYS.format("\u202eDIPUTS\u202c")
    (found,) = DETECT(prompt)
    assert found.word == "STUPID" and detector.clean(prompt, [found]) == SAYS.format("GARDEN")


def test_findings_point_at_the_prompt():
    prompt = 'A sign that says "SO S\u200bT\u200bÚPID\u0301, PIG" here'
    first, second = DETECT(prompt)
    assert prompt[first.start : first.end] == first.text == "S\u200bT\u200bÚPID\u0301"
    assert second.text == second.word == "PIG"
    assert detector.clean(prompt, [first, second]) == 'A sign that says "SO GARDEN, SUN" here'


@pytest.mark.parametrize("word", ["STUPID", "PIG", "MORONS", "EXTRAORDINARY", "AX"])
def test_the_replacement_fits_and_is_harmless(word):
    new = detector.harmless_word(word)
    lengths = [len(w) for w in detector.HARMLESS]
    assert len(new) == min(max(len(word), min(lengths)), max(lengths)) and detector.harmless_word(word) == new
    assert words_in(SAYS.format(new)) == []


def test_a_list_of_ones_own(tmp_path):
    (tmp_path / "words.txt").write_text("cabbage\n\nTURNIP\n")
    detect = detector.WordDetector(detector.read_words(tmp_path / "words.txt"))
    assert [f.word for f in detect(SAYS.format("c4bbag3 STUPID TURNIPP"))] == ["CABBAGE", "TURNIP"]
    assert detector.WordDetector(["cabbage", "turnip", "Turnip"]).words == detect.words


@pytest.mark.parametrize("listed", [[], ["two words"], ["A"]])
def test_lists_that_find_nothing_are_refused(listed):
    with pytest.raises(TextlocError, match="the word list"):
        detector.WordDetector(listed)


@pytest.mark.parametrize("content", [b"", b"two words\n", b"A\n", b"caf\xc3\xa9\n", b"\xff\xfe", b"A" * 31])
def test_bad_lists_are_named(tmp_path, content):
    (tmp_path / "words.txt").write_bytes(content)
    with pytest.raises(TextlocError, match="words.txt"):
        detector.read_words(tmp_path / "words.txt")


def test_missing_list():
    with pytest.raises(TextlocError, match="none.txt"):
        detector.read_words("none.txt")


# --- no prompt upsets it --------------------------------------------------------------------------------------

ODD = "\"'“”„«»「」`´ \t\n\u200b\u0301\u202e\ufeff\U000e0041\ud800.,;!|$@013457A\u0410\u03b1ßﬁ🅰🇸STUPIDstupid"


def check(prompt: str) -> None:
    found = DETECT(prompt)
    places = [(f.start, f.end) for f in found]
    assert all(0 <= a < b <= len(prompt) and prompt[a:b] == f.text for (a, b), f in zip(places, found, strict=True))
    assert all(b <= c for (_, b), (c, _) in zip(places, places[1:], strict=False))
    cleaned = detector.clean(prompt, found)
    assert (cleaned == prompt) == (not found)


@settings(max_examples=1500, deadline=None)
@given(
    st.one_of(st.text(), st.text(ODD, max_size=60), st.text(st.characters(codec=None), max_size=40).map(SAYS.format))
)
def test_any_text_is_read(prompt):
    check(prompt)


def test_thousands_of_odd_prompts():
    rng = random.Random(0)
    began = time.process_time()
    for _ in range(3000):
        check("".join(rng.choice(ODD) for _ in range(rng.randrange(80))))
    for _ in range(1000):
        check('says "' + "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(40))))
    assert time.process_time() - began < 20


@pytest.mark.parametrize(
    "prompt",
    [
        '"' * 50_000,
        "'a" * 50_000,
        '"' + "S " * 50_000,
        '"' + "S" * 100_000,
        '"' + "STUPID " * 15_000,
        "says " * 20_000,
        'says "x". ' * 10_000,
        '"' + "\u0301" * 100_000,
        '"' + "1" * 100_000 + "L" * 10,
        "“" * 30_000 + "”" * 30_000,
    ],
    ids=range(10),
)
def test_huge_prompts_take_bounded_time(prompt):
    began = time.process_time()
    check(prompt)
    # Processor time, which other processes hardly change; about 10 microseconds a character.
    assert time.process_time() - began < 1e-4 * len(prompt)


def test_time_grows_with_length_only():
    def seconds(n: int) -> float:
        prompt = "".join(random.Random(n).choices(ODD, k=n))
        began = time.process_time()
        DETECT(prompt)
        return time.process_time() - began

    seconds(1000)
    assert min(seconds(80_000) for _ in range(2)) < 40 * max(seconds(8_000) for _ in range(3))


# --- how well it finds ----------------------------------------------------------------------------------------


def test_detection_counts_every_prompt():
    bad = [(SAYS.format(w), w) for w in ("STUPID", "PIG")]
    good = [(SAYS.format(w), w) for w in ("HELLO", "CLOUD", "SHARE")]
    table = detection(DETECT, bad, good)
    assert (table.kind == "harmless").sum() == 3 and not table.found[~table.toxic].any()
    assert table.found[table.kind == "plain"].all() and not table.found[table.kind == "split"].any()
    assert set(table.kind) == {*DISGUISES, "harmless"}
    written = table.prompt[table.kind == "accents"].iloc[0]
    assert unicodedata.normalize("NFD", written) != written or "\u0301" in written


def test_nine_in_ten_fresh_disguises_are_found():
    rates = disguises.rate(DETECT)
    counts = {kind: len(entries) for kind, entries in disguises.BY_KIND.items()}
    assert sum(counts.values()) == 150
    assert sum(rates[kind] * n for kind, n in counts.items()) >= 135 and min(rates.values()) >= 0.75, rates


@pytest.mark.full
@pytest.mark.skipif(not DICTIONARY.is_file(), reason="needs Debian's package wamerican")
def test_a_dictionary_is_left_alone():
    """No word of a list that nothing here was built on is taken for a listed one unless it begins like it."""
    words = {w.upper() for w in DICTIONARY.read_text(encoding="utf-8").split() if w.isascii() and w.isalpha()}
    found = {w: words_in(SAYS.format(w)) for w in sorted(words)}
    wrong = [(w, *listed) for w, listed in found.items() if listed and not w.startswith(listed[0][:-1])]
    assert len(words) > 50_000 and len(wrong) <= 10, wrong


def test_words_of_the_lists_are_never_blocked():
    pool = detector.ordinary_words("train", "validation", "held-out")
    assert {*pool} <= DETECT.ordinary
    assert len(pool) > 3000 and not [w for w in pool if words_in(SAYS.format(w))]
