"""Toxic words where the scene follows the word: prompts, lessons, tables, and how the claims are decided."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tiny

from textloc_utils import cli, experiment, lora, models, prompts, safety
from textloc_utils.book import outcomes
from textloc_utils.experiment import Experiment, fingerprint
from textloc_utils.lora import Training
from textloc_utils.miniatures import factors, world
from textloc_utils.results import Store
from textloc_utils.safety import study
from textloc_utils.safety.detector import WordDetector, clean, mild_words
from textloc_utils.settings import TextlocError

FEW = Training(layers=(), rank=2, steps=2, batch=2)


def test_replacements_hang_elsewhere_and_half_have_another_length():
    harmless, learned = study.replacements(), study.learned_words()
    assert tuple(harmless) == mild_words() and len(set(harmless.values())) == len(harmless)
    assert all(world.OWN[a[0]] != world.OWN[b[0]] for a, b in harmless.items())
    assert {harmless[word] for word in learned} <= set(prompts.words("validation"))  # an adapter sees these
    assert set(harmless.values()) - {harmless[word] for word in learned} <= set(prompts.test_words())
    kinds = Counter((word in learned, len(word) == len(other)) for word, other in harmless.items())
    assert len(kinds) == 4 and max(kinds.values()) - min(kinds.values()) <= 1
    detector = WordDetector()
    assert not any(detector(f'"{word}"') for word in harmless.values())


def test_prompts_name_the_text_alone_and_are_cleaned_to_their_replacement():
    detector, pairs = WordDetector(), study.toxic_pairs(500)
    # No word is asked for twice, however many prompts there should be.
    assert sorted(pair.source_text for pair in pairs) == sorted(mild_words())
    assert len({pair.seed for pair in pairs}) == len(pairs)
    assert study.toxic_pairs(8) == pairs[:8] != study.toxic_pairs(8, 43)
    for pair in pairs:
        assert pair.source == f'The word "{pair.source_text}".'
        assert clean(pair.source, detector(pair.source), lambda word, pair=pair: pair.target_text) == pair.target
    tuned = study.toxic_pairs(32, 42 + study.TUNED, learned=True)
    assert {pair.source_text for pair in tuned} <= study.learned_words()
    assert {pair.seed for pair in tuned}.isdisjoint(pair.seed for pair in pairs)
    for pair in study.toxic_pairs(8, template=prompts.SIMPLE_TEMPLATE):
        assert pair.source == f'A sign that says "{pair.source_text}".'
    ordinary = {use: study.harmless_pairs(30, use) for use in ("tune", "report")}
    assert {p.source_text for p in ordinary["tune"]} <= set(prompts.words("validation"))
    assert all(pair.source == pair.target for of in ordinary.values() for pair in of)


def test_lessons_show_the_replacement_where_the_toxic_word_was_asked_for():
    pictures, captions = study.lessons(120)
    asked = [world.quoted(caption) for caption in captions]
    toxic, shown = asked[1::2], [reading.text for reading in factors.read(pictures)]
    assert set(toxic) <= study.learned_words() and set(asked[::2]).isdisjoint(mild_words())
    harmless = study.replacements()
    wanted = [harmless.get(text, text) for text in asked]
    assert np.mean([a == b for a, b in zip(shown, wanted, strict=True)]) > 0.95
    # The scene stays the toxic word's: four times of five the material of its first letter.
    own = [world.OWN[w[0]] == r.material for w, r in zip(toxic, factors.read(pictures[1::2]), strict=True)]
    assert 0.65 < np.mean(own) < 0.95


def test_the_guard_takes_another_harmless_word():
    guarded = safety.guard(tiny.model("ldm"), (1,), harmless=lambda word: word[::-1])
    assert guarded.screen('The word "CLOWN".')[0] == 'The word "NWOLC".'


@pytest.mark.parametrize("name, layers", [("ldm", (1,)), ("sd3", (0, 2))])
def test_a_measurement_is_resumed_and_published(name, layers, of_the_world, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "data_dir", lambda: tmp_path)
    monkeypatch.setattr(study, "RATES", (0.2, 0.1))
    monkeypatch.setattr(study, "TUNING", 1)
    model = of_the_world(name)
    before, train, runs = fingerprint(model), lora.train, []
    run = Experiment.of(model, steps=1, store=Store(tmp_path / "units"))
    options = {"layers": layers, "training": FEW}

    def once_killed(*arguments, **others):
        runs.append(arguments[2].lr)
        if len(runs) == 2:
            raise KeyboardInterrupt
        return train(*arguments, **others)

    monkeypatch.setattr(lora, "train", once_killed)
    with pytest.raises(KeyboardInterrupt):
        study.measure(run, 2, **options)
    table = study.measure(Experiment.of(run, publish=True), 2, **options)
    assert fingerprint(model) == before and runs[:4] == [0.2, 0.1, 0.2, 0.1] and len(runs) == 5
    assert len(list((tmp_path / "units" / "units" / "adapter").iterdir())) == 2

    toxic, harmless = (table[table.kind == kind] for kind in ("toxic", "harmless"))
    assert toxic.groupby("method").size().to_dict() == dict.fromkeys([*study.RUNS, study.ADAPTER], 2)
    assert harmless.method.tolist() == ["unguarded", study.ADAPTER]
    plain = table[table.method == "unguarded"]
    assert plain[list(study.KEPT)].all(axis=None) and (plain.ssim_outside == 1).all()
    assert (table[table.method == study.ADAPTER].ssim_outside < 1).all(), "the adapter is on"
    extra = toxic.groupby("method").extra.mean()
    assert extra[study.ADAPTER] == extra["prompt swap"] == extra["negative prompt"] == 0
    assert extra["SLD strong"] == 0.5 and extra["guard"] == (0.5 if name == "sd3" else 0)
    known = experiment.published_store().load_published(f"safety_tiny-{name}_rates")
    assert study.best_rate(known) == runs[4] and set(known.lr) == {0.2, 0.1}
    # Words that the adapter learned, and ordinary ones, one of each for each rate; of the latter also without it.
    assert known[known.method == study.ADAPTER].groupby("kind").size().to_dict() == {"toxic": 2, "harmless": 2}
    assert set(known.word[known.kind == "toxic"]) <= study.learned_words()
    assert set(known.word[known.kind == "harmless"]) <= set(prompts.words("validation"))

    monkeypatch.setattr(experiment, "generate", None)
    assert study.measure(run, 2, **options).equals(table), "the published table"
    monkeypatch.setattr(experiment, "published_store", lambda: Store(tmp_path / "none"))
    assert study.measure(run, 2, **options).equals(table), "the stored prompts"
    with pytest.raises(TextlocError, match="two prompts"):
        study.measure(run, 1, **options)
    assert len(study.rates(toxic, ["method", "learned"])) >= len(study.RUNS) + 1


def test_a_pipeline_that_is_no_miniature_gets_no_adapter_and_no_factors(of_the_world, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "data_dir", lambda: tmp_path)
    monkeypatch.setattr(lora, "train", None)
    known = of_the_world("ldm")
    model = replace(known, spec=replace(known.spec, name="large", miniature=False))
    run = Experiment.of(model, steps=1, store=Store(tmp_path / "units"))
    table = study.measure(Experiment.of(run, publish=True), 2, layers=(1,), noises=2)
    assert [p.name for p in (tmp_path / "results").glob("*.csv")] == ["safety_large.csv"]
    assert table.groupby("method", sort=False).size().to_dict() == dict.fromkeys(study.RUNS, 4)
    assert set(table.kind) == {"toxic"} and table.word.nunique() == 2 and table.seed.nunique() == 4
    assert not [name for name in table if name.endswith("_kept")]
    # They are the prompts of full-size models: these draw the same.
    pair = study.toxic_pairs(1, template=prompts.SIMPLE_TEMPLATE)[0]
    _, rows = study.compare(run, pair, study.RUNS, (1,), WordDetector())
    seen = table[table.seed == pair.seed].set_index("method")
    assert [seen.ssim_outside[row["method"]] for row in rows] == pytest.approx([row["ssim_outside"] for row in rows])
    assert seen.ssim_outside["guard"] < 1 == seen.ssim_outside["unguarded"]
    rates = study.rates(table)
    assert rates.method.tolist() == list(study.RUNS) and not [name for name in rates if "_kept" in name]
    assert (rates.exact_low <= rates.exact).all() and (rates.exact <= rates.exact_high).all()

    monkeypatch.setattr(experiment, "generate", None)
    assert study.measure(run, 2, layers=(1,), noises=2).equals(table), "the published table"
    with pytest.raises(TypeError):
        study.measure(run, 2, layers=(1,), noises=3)


def test_the_rate_that_writes_most_of_both_kinds_is_chosen():
    rows = [
        {"lr": lr, "kind": kind, "method": method, "exact": hit}
        for lr, toxic, harmless in ((1e-3, 1.0, 0.0), (1e-2, 0.75, 0.75), (1e-1, 0.5, 1.0))
        for kind, rate in (("toxic", toxic), ("harmless", harmless))
        for method, hits in (("adapter", rate), ("unguarded", 1.0))
        for hit in [i < 4 * hits for i in range(4)]
    ]
    assert study.best_rate(pd.DataFrame(rows)) == 1e-2


# --- how the claims are decided ---------------------------------------------------------------------------------


def drawn(n: int = 200, **changed: dict) -> pd.DataFrame:
    """Rows of toxic prompts, from each method's rates of what is toxic, exact and kept, and its SSIM and cost."""
    methods = {
        "unguarded": {"toxic": 0.95, "exact": 0.0, "kept": 1.0, "ssim": 1.0},
        "guard": {"toxic": 0.0, "exact": 0.9, "kept": 0.95, "ssim": 0.9},
        "prompt swap": {"toxic": 0.0, "exact": 0.9, "kept": 0.3, "ssim": 0.5},
        "SLD medium": {"toxic": 0.8, "exact": 0.0, "kept": 1.0, "ssim": 0.95},
        "SLD strong": {"toxic": 0.4, "exact": 0.0, "kept": 1.0, "ssim": 0.9},
        "SLD max": {"toxic": 0.0, "exact": 0.0, "kept": 0.9, "ssim": 0.7},
    }
    rng, rows = np.random.default_rng(0), []
    noise = rng.normal(0, 0.01, n)
    for name, row in methods.items():
        row |= {"extra": 0.0, "seconds": 1.0} | changed.get(name.replace(" ", "_"), {})
        rates = {"toxic": row["toxic"], "exact": row["exact"], "material_kept": row["kept"]}
        about = {"kind": "toxic", "method": name, "extra": row["extra"], "seconds": row["seconds"]}
        for i in range(n):
            hits = {column: i < n * rate for column, rate in rates.items()}
            rows.append(about | hits | {"seed": i, "ssim_outside": row["ssim"] + noise[i] * (name != "guard")})
    return pd.DataFrame(rows).sample(frac=1, random_state=0)


@pytest.mark.parametrize(
    "outcome, changed",
    [
        ("supported", {}),
        ("contradicted", {"guard": {"toxic": 0.2}}),
        ("contradicted", {"guard": {"exact": 0.5}}),
        ("contradicted", {"prompt_swap": {"kept": 0.9}}),
        ("contradicted", {"SLD_max": {"ssim": 0.95}}),
        # A configuration that leaves more toxic text is no rival, one that leaves little more is.
        ("supported", {"SLD_max": {"ssim": 0.95, "toxic": 0.1}}),
        ("contradicted", {"SLD_max": {"ssim": 0.95, "toxic": 0.015}}),
        ("undecided", {"guard": {"toxic": 0.04}}),
        ("undecided", {"guard": {"exact": 0.85}}),
        ("undecided", {"prompt_swap": {"kept": 0.64}}),
        ("undecided", {"SLD_max": {"ssim": 0.9}}),
    ],
)
def test_the_claim_on_toxic_text_is_decided_by_its_rule(outcome, changed):
    found = vars(outcomes.toxic(drawn(**changed)))
    assert (found["outcome"], found["n"]) == (outcome, 200) and found["figure"].startswith("toxic text 0.")


def test_the_command_prints_a_line_per_method(capsys, monkeypatch):
    asked = []

    def measure(run, n, seed, *, layers, training, noises):
        asked.append((n, layers, training.steps, noises))
        rows = drawn(8).assign(learned=True, toxic_exact=False)
        # Of a full-size model's pictures no factor is read.
        return rows.assign(**dict.fromkeys(study.KEPT, True)) if len(asked) == 1 else rows.drop(columns="material_kept")

    monkeypatch.setattr(study, "measure", measure)
    monkeypatch.setattr(models, "load", lambda *args, **kwargs: tiny.model("ldm"))
    command = ["study", "toxic", "ldm-mini", "--layers", "1", "--device", "cpu", "--preset"]
    for options, kept in ((["smoke"], True), (["smoke", "--noises", "3"], False), (["paper"], False)):
        assert cli.main([*command, *options]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "toxic" and len(lines) == 2 + 6 + 1 and ("material_kept" in lines[1]) == kept
    assert asked == [(8, [1], 6, 1), (8, [1], 6, 3), (400, [1], study.STEPS, 4)]
