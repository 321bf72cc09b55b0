"""Several trainings of a miniature: searched by one rule, scored against planted layers, and published."""

import json
import shutil

import pandas as pd
import pytest

from textloc_utils import cli, experiment, localization, metrics, models, specificity, sweeps, trainings
from textloc_utils.book import plots
from textloc_utils.miniatures import planted
from textloc_utils.settings import TextlocError
from textloc_utils.sites import joined


def shipped(folder, seed, seeing=None):
    """A folder as `textloc train sd3-mini --world plain --ship` writes it, with the weights of the book's miniature."""
    shutil.copytree(models.spec("sd3-mini").source, folder)
    about = json.loads((folder / "textloc.json").read_text())
    about["trained"] = {"test": {"exact": {"mean": 0.25}}} | ({"seeing": seeing} if seeing else {})
    (folder / "textloc.json").write_text(json.dumps(about))
    layers = {"target": [0.0] * 11 + [0.4], "exact_layers": [0.0] * 12}
    evaluations = [{"samples": 5, "exact": 0.0}, {"samples": 9, "exact": 0.5, "all_layers": 0.8, **layers}]
    report = {"name": "sd3-mini", "seed": seed, "layers": None, "seeing": seeing, "world": "plain", "seconds": 90}
    (folder / "training.json").write_text(json.dumps({"report": report, "evaluations": evaluations}))
    return folder


def test_planted_layers_are_hidden_again_when_a_miniature_is_loaded(tmp_path):
    model = models.load("sd3-mini", model_path=shipped(tmp_path / "planted", 1, [3, 7]), device="cpu")
    processors = [model.denoiser.get_submodule(layer.name).processor for layer in model.layers]
    assert [p.sees for p in processors] == [i in (3, 7) for i in range(12)]
    plain = models.load("sd3-mini", model_path=shipped(tmp_path / "plain", 1), device="cpu")
    kinds = {type(plain.denoiser.get_submodule(layer.name).processor) for layer in plain.layers}
    assert planted._Masked not in kinds


def test_runs_are_searched_and_published(tmp_path, monkeypatch):
    runs = [shipped(tmp_path / "one", 1), shipped(tmp_path / "two", 2, [3, 7])]
    monkeypatch.setattr(experiment, "data_dir", lambda: tmp_path)
    monkeypatch.setenv("TEXTLOC_RESULTS", str(tmp_path / "store"))
    asked = []

    def found(how, layers, cost, strongest=()):
        none = metrics.Interval(1.0, 1.0, 1.0, 2)
        effects = tuple(0.5 if layer in strongest else 0.0 for layer in range(12))
        about = {"effects": effects, "score": None, "reached": none, "confidence": 1.0, "share": 0.1, "pairs": 2}
        return localization.Found(model="", search=how, layers=layers, row_evaluations=cost, seconds=0.0, **about)

    def localize(run, pairs, *, how, by):
        asked.append((how, by, {pair.source_text for pair in pairs}))
        return found(how, (4,), 100)

    # The set may hold a planted layer that is not among the strongest alone, and the other way round.
    known = {
        "exhaustive": found("exhaustive", (3, 7), 100, (3, 9)),
        "attention": found("attention", (3, 9, 10), 2, (3, 7)),
    }
    monkeypatch.setattr(trainings.localization, "localize", localize)
    monkeypatch.setattr(specificity, "searches", lambda run, n, seed: known)

    def table(run, pairs, sites, *, source):
        asked.append(("report", sites, {pair.source_text for pair in pairs}))
        return pd.DataFrame([{"kind": s.kind, "exact": s.kind == "values"} for s in sites for _ in pairs])

    monkeypatch.setattr(sweeps, "table", table)
    told = trainings.publish("sd3-mini", runs, 4).set_index(["run", "search"])
    assert told.index.tolist() == [("one", "exhaustive"), ("two", "exhaustive"), ("two", "attention")]
    assert told.layers.tolist() == ["4", "3 7", "3 9 10"] and told.planted.tolist() == ["", "3 7", "3 7"]
    assert (
        (told.text == "letters").all()
        and told.found.tolist() == [0, 2, 1]
        and told.false.tolist() == [0, 0, 2]
        and told.cost.tolist() == [1, 1, 0.02]
    )
    assert told.strongest.tolist() == [0, 1, 2] and set(told.minutes) == {1.5}
    assert told["values"].tolist()[:2] == [1.0, 1.0] and told["keys"].tolist()[:2] == [0.0, 0.0]
    (_, by, selected), (_, sites, reported), _ = asked
    assert by == "exact" and not selected & reported and {joined(s.layers) for s in sites} == {"4"}
    assert [(s.tensors, s.tokens) for s in sites] == [("kv", ""), ("k", ""), ("v", ""), ("kv", "different")]
    log = experiment.published_store().load_published("trainings_sd3-mini_log")
    assert log.groupby("run").size().tolist() == [14, 14] and log.layer.max() == 11
    assert log[(log.samples == 9) & (log.layer == -1)].all_layers.tolist() == [0.8, 0.8]
    model = models.load("sd3-mini", device="cpu")
    assert len(trainings.published(model)) == 3 and set(told.spelled) == {0.25}
    both = trainings.together(["sd3-mini", "ldm-mini"])
    assert set(both.model) == {"sd3-mini"} and list(both.columns[1:]) == list(trainings.COLUMNS)
    assert trainings.together([]).empty and "planted" in trainings.together([])
    on_the_way = trainings.evaluations(model)
    assert list(on_the_way) == ["one", "two"] and on_the_way["one"].samples.tolist() == [5, 9]
    # At the first evaluation no layer was patched alone.
    assert on_the_way["one"].best_layer.isna().tolist() == [True, False] and on_the_way["two"].best_layer.iloc[1] == 0.4
    both = {name: rows.assign(plain_target=rows.exact) for name, rows in on_the_way.items()}
    assert len(plots.binding(both).axes) >= 2


def test_runs_that_are_none_are_refused(tmp_path):
    run = shipped(tmp_path / "a" / "run", 1)
    with pytest.raises(TextlocError, match="holds no miniature"):
        trainings.publish("sd3-mini", [tmp_path], 1)
    with pytest.raises(TextlocError, match="holds sd3-mini, not ldm-mini"):
        trainings.publish("ldm-mini", [run], 1)
    for damaged in ("", "[]", '{"report": {}}', "[" * 100_000):
        (tmp_path / "training.json").write_text(damaged)
        with pytest.raises(TextlocError, match=r"training\.json is corrupt; restore it"):
            trainings.publish("sd3-mini", [tmp_path], 1)
    twice = shutil.copytree(run, tmp_path / "b" / "run")
    with pytest.raises(TextlocError, match="different names, got run, run"):
        trainings.publish("sd3-mini", [run, twice], 1)


def test_the_command_prints_the_table(capsys, monkeypatch, tmp_path):
    asked = []

    def publish(name, runs, n, seed, *, progress):
        asked.append((name, [str(run) for run in runs], n, seed))
        return pd.DataFrame([{"run": "one", "layers": "4 5"}])

    monkeypatch.setattr(trainings, "publish", publish)
    assert cli.main(["study", "trainings", "sd3-mini", "one", "two", "--preset", "smoke", "--seed", "3"]) == 0
    assert asked == [("sd3-mini", ["one", "two"], 4, 3)] and "4 5" in capsys.readouterr().out
