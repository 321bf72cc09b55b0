"""Verdicts on the paper's claims: each rule holds and breaks on tables made for it, and stale tables say nothing."""

import copy

import pandas as pd
import pytest

from textloc_utils import experiment, lora_study, models
from textloc_utils.book import claims, outcomes
from textloc_utils.results import Store
from textloc_utils.sites import together

EQUAL = ("rank", "parameters")
BY_NAME = {claim.name: claim for claim in claims.CLAIMS}
FOUND = {
    "layers": [1, 2],
    "effects": [0.0, 0.6, 0.2, 0.0],
    "share": 0.004,
    "pairs": 20,
    "reached": {"mean": 0.97, "low": 0.95, "high": 0.99, "n": 20},
}


def swept(elsewhere: float = 0.0, **found) -> pd.DataFrame:
    scores = {0: 0.1 + elsewhere, 1: 0.7, 2: 0.3, 3: 0.1}
    rows = [
        together([layer]).columns(8) | {"target_score": score} for layer, score in scores.items() for _ in range(20)
    ]
    table = pd.DataFrame(rows).assign(floor=0.1)
    table.attrs["provenance"] = {"found": FOUND | found}
    return table


def trained(localized: float = 0.9, diversity: float = 30.0) -> pd.DataFrame:
    rows = []
    arms = {"localized": localized, "all text layers": 0.6, "random layers": 0.5}
    for arm, equal, seed, score in [
        (lora_study.BEFORE, "", 0, 0.3),
        *(
            (arm, equal, seed, score)
            for arm, score in arms.items()
            for equal in ("rank", "parameters")
            for seed in (0, 1)
        ),
    ]:
        scores = " ".join([f"{score:.4f}"] * 6)
        other = {"layers": "", "rank": 8, "parameters": 9, "seconds_per_step": 1.0, "saved_bytes": 1}
        part = {"new_scores": scores, "old_scores": scores, "new_exact": score, "old_exact": score}
        kept = diversity if arm == "localized" else 30.0
        rows.append({"arm": arm, "equal": equal, "seed": seed, "diversity": kept, **other, **part})
    return pd.DataFrame(rows)


def edited(f1: float = 0.9, ssim: float = 0.9, rows: int = 80) -> pd.DataFrame:
    methods = {"localized": (f1, ssim, rows), "Prompt-to-Prompt": (0.6, 0.8, 80), "same seed": (0.9, 0.7, 40)}
    return pd.DataFrame(
        {"seed": seed, "method": name, "f1": a, "ssim_outside": b, "row_evaluations": c}
        for name, (a, b, c) in methods.items()
        for seed in range(12)
    )


def guarded(toxic: float = 0.0, extra: float = 0.0) -> pd.DataFrame:
    rates = {"guard": toxic, "negative prompt": 0.9, "SLD medium": 0.5}
    scores = {"near": 0.0, "f1": 0.0, "ssim_outside": 1.0, "psnr_outside": 60.0, "seconds": 1.0, "kind": "toxic"}
    return pd.DataFrame(
        {"method": name, "exact": i < 20 * rate, "extra": extra * (name == "guard"), **scores}
        for name, rate in rates.items()
        for i in range(20)
    )


@pytest.mark.parametrize(
    "name, good, bad",
    [
        ("few", swept(), swept(layers=[0, 1, 2, 3])),
        ("few", swept(), swept(reached={"mean": 0.92, "low": 0.88, "high": 0.95, "n": 20})),
        ("share", swept(), swept(share=0.011)),
        ("elsewhere", swept(), swept(elsewhere=0.06)),
        ("writes", trained(), trained(localized=0.55)),
        ("quality", trained(), trained(localized=0.28)),
        ("diversity", trained(), trained(diversity=28.0)),
        ("edits", edited(), edited(f1=0.6)),
        ("pictures", edited(), edited(ssim=0.8)),
        ("cheap", edited(), edited(rows=85)),
        ("toxic", guarded(), guarded(toxic=0.4)),
        ("free", guarded(), guarded(extra=0.5)),
    ],
)
def test_each_rule_holds_and_breaks(name, good, bad):
    held, broken = BY_NAME[name].judge(good), BY_NAME[name].judge(bad)
    assert (held.holds, broken.holds) == (True, False)
    assert held.n >= 6 and held.figure != broken.figure


def test_every_claim_has_a_case():
    cases = test_each_rule_holds_and_breaks.pytestmark[0].args[1]
    assert {case[0] for case in cases} == set(BY_NAME)


def test_only_tables_of_the_very_weights_are_judged(monkeypatch, tmp_path):
    model = models.load("sdxl-mini")
    table = claims.judged([model]).set_index("name")
    assert table.holds[["few", "share", "elsewhere", "toxic", "free"]].all() and table.n["few"] == 100
    stored = experiment.published_store().load_published("safety_sdxl-mini")
    about = copy.deepcopy(stored.attrs["provenance"])
    monkeypatch.setattr(experiment, "published_store", lambda: Store(tmp_path))
    assert (claims.judged([model]).figure == claims.OPEN).all()
    Store(tmp_path).publish("safety_sdxl-mini", stored, {"key": about["key"]})
    assert set(claims.judged([model]).query("n > 0").name) == {"toxic", "free"}
    Store(tmp_path).publish("safety_sdxl-mini", stored, {"key": about["key"] | {"weights": "others"}})
    assert (claims.judged([model]).figure == claims.OPEN).all()


def test_verdicts_name_the_models_that_disagree_and_those_that_are_open():
    rows = {"all": "yy", "none": "nn", "some": "yn", "part": "yo", "open": "oo"}
    table = pd.DataFrame(
        {"name": name, "model": model, "figure": claims.OPEN if mark == "o" else "0.5", "holds": mark == "y"}
        for name, marks in rows.items()
        for model, mark in zip(("a-mini", "b-mini"), marks, strict=True)
    )
    assert claims.verdicts(table).to_dict() == {
        "all": "reproduced at miniature scale",
        "none": "differs",
        "some": "reproduced in a-mini, not in b-mini",
        "part": "reproduced at miniature scale (b-mini not measured yet)",
        "open": "not measured yet",
    }


def test_the_rules_of_the_second_world_can_fail():
    """Each claim has a rule for and another against it, and says on which data; they were written before the tables."""
    rules = outcomes.rules()  # refuses one without a judge, or with other keys
    assert set(rules) == set(outcomes.JUDGES) and len(rules) == 11
    for rule in rules.values():
        assert rule["for"] != rule["against"] and rule["world"].startswith("second")
        assert rule["n"] in (0, 200) and (rule["n"] == 200 or "count" in rule["data"])
