"""Outcomes of the paper's claims: each judge gives each of its outcomes on tables made for it."""

import pandas as pd
import pytest

from textloc_utils import edit, models, scene_pairs
from textloc_utils.book import outcomes
from textloc_utils.book.outcomes import CONTRADICTED, SUPPORTED, UNDECIDED, UNTESTABLE
from textloc_utils.settings import TextlocError
from textloc_utils.sites import Site

ALL = ("material", "ink", "typeface", "sign")


def searched(layers, of=12, share=0.004, brought=1.0):
    table = pd.DataFrame(
        {"kind": ["layer"] * of + ["all"] * 100, "exact": [False] * of + [i < 100 * brought for i in range(100)]}
    )
    found = {"layers": list(layers), "effects": [0.0] * of, "share": share, "pairs": 100}
    table.attrs["provenance"] = {"found": found, "seconds": 30.0}
    return table


def trainings(*sets, of=12):
    rows = [{"search": "exhaustive", "planted": "", "number": number, "of": of} for number in sets]
    rows += [{"search": "exhaustive", "planted": "3", "number": 12, "of": of}]
    return pd.DataFrame([*rows, {"search": "attention", "planted": "", "number": 12, "of": of}])


@pytest.mark.parametrize(
    ("layers", "more", "outcome"),
    [
        ((4,), None, UNDECIDED),  # one training is not every training
        ((4,), (1,), SUPPORTED),
        ((4,), (1, 2), UNDECIDED),
        ((4, 5, 6, 7), (1,), UNDECIDED),
        ((4, 5, 6, 7), (1, 4), CONTRADICTED),
    ],
)
def test_few(layers, more, outcome):
    told = outcomes.few(searched(layers), None if more is None else trainings(*more))
    assert told.outcome == outcome and told.figure.startswith(f"{len(layers)} of 12") and told.n == 100
    assert told.figure.count(" of ") == 1 + len(more or ())


def test_share():
    assert outcomes.share(searched((4,), share=0.0099)).outcome == SUPPORTED
    assert outcomes.share(searched((4,), share=0.01)).outcome == CONTRADICTED
    assert outcomes.share(searched((4,), share=0.0123)).figure == "1.23 %"


def reported(effect, n=200, kind="others"):
    hits = round(abs(effect) * n)
    rows = [
        {
            "differs": "text",
            **Site(kind=kind, layers=(1, 2)).columns(8),
            "seed": i,
            "floor": 0.1,
            "target_score": 0.1 + (i < hits),
        }
        for i in range(n)
    ]
    return pd.DataFrame([*rows, rows[0] | {"differs": "ink", "target_score": 1.0}])


@pytest.mark.parametrize(
    ("effect", "outcome"), [(0.0, SUPPORTED), (0.04, UNDECIDED), (0.1, UNDECIDED), (0.3, CONTRADICTED)]
)
def test_others(effect, outcome):
    told = outcomes.others(reported(effect))
    assert told.outcome == outcome and told.figure.startswith(f"{effect:.2f} [") and told.n == 200


def test_others_where_there_are_none():
    assert outcomes.others(reported(0.5, kind="found")).outcome == UNTESTABLE


@pytest.mark.parametrize(
    ("factors", "outcome"),
    [
        ({"material": (4, 5, 6, 7), "ink": (8,), "typeface": None, "sign": (4, 5, 1, 2)}, SUPPORTED),
        ({"material": (4, 5), "ink": (8,)}, CONTRADICTED),  # the same set
        ({"material": (4, 8), "ink": (5,)}, CONTRADICTED),  # sets as small, and not apart
        ({"material": (4, 5, 8), "ink": (9,)}, UNDECIDED),
        ({}, UNTESTABLE),
    ],
)
def test_specific(factors, outcome):
    tables = [None if factors.get(name) is None else searched(factors[name]) for name in scene_pairs.FACTORS]
    told = outcomes.specific(searched((4, 5)), *tables)
    assert told.outcome == outcome and ("text 4 5" in told.figure) == bool(factors)


def test_a_factor_that_all_layers_seldom_bring_is_not_localized():
    # Ink has the text's own set, which would contradict; but all layers bring it in fewer than half of the pairs.
    for brought, outcome in ((0.49, SUPPORTED), (0.5, CONTRADICTED)):
        told = outcomes.specific(searched((4, 5)), searched((7,)), searched((4, 5), brought=brought), None, None)
        assert told.outcome == outcome and ("ink" in told.figure) == (outcome == CONTRADICTED)


def carried(rates, n=200):
    rows = []
    for name, rate in rates.items():
        for i in range(n):
            factors = {f"{f}_read": "old" for f in ALL} | {f"target_{f}": "new" for f in ALL}
            factors[f"{name}_read"] = "new" if i < rate * n else "old"
            for kind in ("source", "found", "all"):
                moved = factors | ({f"{name}_read": "new"} if kind == "all" else {})
                rows.append(
                    {"differs": f"text {name}", **Site(kind=kind, layers=(4,)).columns(8), "exact": True, **moved}
                )
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("ink", "outcome"), [(0.05, SUPPORTED), (0.1, UNDECIDED), (0.2, CONTRADICTED)])
def test_carries(ink, outcome):
    told = outcomes.carries(carried(dict.fromkeys(ALL, 0.0) | {"ink": ink}))
    assert told.outcome == outcome and f"ink {ink:.2f} [" in told.figure and told.n == 200


def edited(methods, n=200):
    """Per method: shares of kept material and exact, SSIM, row evaluations, seconds."""
    rows = []
    for name, (material, exact, ssim, cost, seconds) in methods.items():
        for i in range(n):
            kept = {f"{f}_before": "old" for f in ALL} | {f"{f}_read": "old" for f in ALL}
            kept["material_read"] = "old" if i < material * n else "new"
            rows.append(
                {
                    "seed": i,
                    "method": name,
                    "start": 0,
                    "share": 0.0,
                    "exact": i < exact * n,
                    **kept,
                    "ssim_outside": ssim + 0.01 * (i % 3),
                    "row_evaluations": cost,
                    "seconds": seconds,
                }
            )
    return pd.DataFrame(rows)


SAME = (0.3, 0.9, 0.7, 20, 1.0)


@pytest.mark.parametrize(
    ("ours", "same", "outcome"),
    [
        ((0.95, 0.88), SAME, SUPPORTED),
        ((0.85, 0.88), SAME, UNDECIDED),
        ((0.35, 0.9), SAME, CONTRADICTED),
        ((0.95, 0.75), SAME, CONTRADICTED),
        ((0.95, 0.88), (0.45, *SAME[1:]), SUPPORTED),
        # The new prompt keeps the material by itself: there is too little to keep, whatever editing does.
        ((0.95, 0.88), (0.46, *SAME[1:]), UNTESTABLE),
        ((0.35, 0.5), (0.6, *SAME[1:]), UNTESTABLE),
    ],
)
def test_edits(ours, same, outcome):
    table = edited({edit.LOCALIZED: (*ours, 0.9, 40, 2.0), edit.SAME_SEED: same})
    told = outcomes.edits(table)
    assert told.outcome == outcome and told.n == 200 and f"kept {ours[0]:.2f} [" in told.figure


@pytest.mark.parametrize(
    ("ours", "maps", "own", "outcome"),
    [
        ((0.9, 0.90), (0.9, 0.8), (0.91, 0.85), SUPPORTED),
        ((0.8, 0.90), (0.9, 0.8), (0.9, 0.85), UNDECIDED),  # at a lower exact rate
        ((0.9, 0.80), (0.9, 0.7), (0.9, 0.85), CONTRADICTED),
        ((0.9, 0.80), (0.9, 0.7), (0.9, 0.80), CONTRADICTED),  # as much
        ((0.9, 0.80), (0.9, 0.7), (0.7, 0.85), UNDECIDED),  # less, and surely more whole words
    ],
)
def test_maps(ours, maps, own, outcome):
    methods = {edit.LOCALIZED: ours, edit.P2P: maps, edit.P2P_OWN: own}
    told = outcomes.maps(edited({name: (1.0, *scores, 40, 2.0) for name, scores in methods.items()}))
    assert told.outcome == outcome and told.n == 200


@pytest.mark.parametrize(
    ("exact", "outcome"),
    [(0.90, CONTRADICTED), (0.89, CONTRADICTED), (0.5, UNDECIDED)],  # as often, not surely more seldom, surely
)
def test_maps_counts_only_what_is_sure(exact, outcome):
    """More of the picture is kept on average, and less of it in every other pair: that is not surely more."""
    table = edited(dict.fromkeys((edit.LOCALIZED, edit.P2P, edit.P2P_OWN), (1.0, 0.9, 0.9, 40, 2.0)))
    table.loc[table.method == edit.P2P, "ssim_outside"] = 0.5
    own = table.method == edit.P2P_OWN
    table.loc[own, "ssim_outside"] += -0.01 + 0.3 * (-1.0) ** table.seed[own]
    table.loc[own, "exact"] = table.seed[own] < exact * 200
    told = outcomes.maps(table)
    assert f"{edit.P2P_OWN}: SSIM +0.01" in told.figure and told.outcome == outcome


@pytest.mark.parametrize(
    ("rows", "seconds", "outcome"),
    [(40, 2.0, SUPPORTED), (40, 2.3, UNDECIDED), (40, 2.6, CONTRADICTED), (44, 2.0, CONTRADICTED)],
)
def test_cheap(rows, seconds, outcome):
    told = outcomes.cheap(edited({edit.LOCALIZED: (1, 1, 1, rows, seconds), edit.SAME_SEED: SAME}))
    assert told.outcome == outcome and told.figure.startswith(f"{rows / 40:.2f} times")


@pytest.mark.parametrize(
    ("rows", "seconds", "outcome"), [(20, 1.04, SUPPORTED), (20, 1.2, UNDECIDED), (21, 1.0, CONTRADICTED)]
)
def test_free(rows, seconds, outcome):
    table = pd.DataFrame(
        {"kind": kind, "seed": i, "method": name, "row_evaluations": cost, "seconds": time}
        for i in range(5)
        for kind in ("toxic", "harmless")
        for name, cost, time in (("unguarded", 20, 1.0), ("guard", rows if kind == "toxic" else 99, seconds))
    )
    told = outcomes.free(table)
    assert told.outcome == outcome and told.n == 5


def test_every_rule_has_a_judge_and_says_what_it_takes(monkeypatch, tmp_path):
    rules = outcomes.rules()
    assert list(rules) == list(dict.fromkeys(rules)) and set(rules) == set(outcomes.JUDGES)
    for rule in rules.values():
        assert all("{}" in table for table in rule["tables"]) and rule["command"].startswith("textloc study ")
    monkeypatch.setattr(outcomes, "data_dir", lambda: tmp_path)
    (tmp_path / "claims.toml").write_text('[few]\nclaim = "x"\n')
    with pytest.raises(TextlocError, match="few needs a judge, and exactly the keys claim, paper, for"):
        outcomes.rules()


def test_claims_are_judged_on_the_tables_that_are_there(monkeypatch):
    model = models.load("sd3-mini", device="cpu")
    there = {"localize_sd3-mini_exhaustive": searched((4,))}
    monkeypatch.setattr(outcomes, "published_table", lambda model, name: there.get(name))
    told = outcomes.judged([model]).set_index("name")
    assert (
        told.outcome["few"] == UNDECIDED
        and told.outcome["share"] == SUPPORTED
        and told.outcome["edits"] == outcomes.OPEN
    )
    assert told.outcome["specific"] == UNTESTABLE and told.minutes["few"] == 0.5
    assert told.tables["few"] == "localize_sd3-mini_exhaustive" and told.tables["edits"] == ""
