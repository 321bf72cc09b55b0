"""An experiment: its settings and key, its units, its published tables, and what tells models apart."""

import pandas as pd
import pytest
import tiny
import torch

from textloc_utils import experiment, models, ocr
from textloc_utils.experiment import Experiment
from textloc_utils.results import Store
from textloc_utils.settings import TextlocError


def test_settings_are_the_model_s_own_until_they_are_given():
    model = tiny.model("sd3")
    own = Experiment.of(model)
    assert own.settings == {"steps": model.spec.steps, "guidance": model.spec.guidance, "negative_prompt": None}
    few = Experiment.of(own, steps=2, negative_prompt="blur", guidance=None)
    assert few.settings == {"steps": 2, "guidance": model.spec.guidance, "negative_prompt": "blur"}
    assert few.model is model and few.store is own.store and Experiment.of(few).settings == few.settings
    assert len({repr(sorted(each.key.items(), key=str)) for each in (own, few, Experiment.of(own, guidance=2.0))}) == 3


def test_what_is_drawn_obeys_the_settings():
    model, prompt = tiny.model("sd3"), ['A sign that says "HELLO".']
    few = Experiment.of(model, steps=2)
    assert few.draw(prompt, [1]).row_evaluations == 2 * 2
    assert few.draw(prompt, [1], steps=3).row_evaluations == 2 * 3
    assert Experiment.of(few, guidance=1.0).draw(prompt, [1]).row_evaluations == 2
    plain, negative = few.draw(prompt, [1]).images, Experiment.of(few, negative_prompt="HELLO").draw(prompt, [1]).images
    assert (plain != negative).any()


def test_units_are_made_once_and_come_back_in_order(tmp_path):
    made = []
    run = Experiment.of(tiny.model("ldm"), store=Store(tmp_path))

    def compute(item):
        made.append(item)
        return [{"item": item, "half": item / 2}]

    assert run.units("k", [4, 2], {"a": 1}, compute).item.tolist() == [4, 2]
    assert run.units("k", [2, 3, 4], {"a": 1}, compute).half.tolist() == [1.0, 1.5, 2.0]
    assert made == [4, 2, 3]
    run.units("k", [4], {"a": 2}, compute)
    Experiment.of(run, steps=run.steps + 1).units("k", [4], {"a": 1}, compute)
    assert made == [4, 2, 3, 4, 4]


def test_a_table_is_published_and_taken_for_its_own_key_only(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "data_dir", lambda: tmp_path)
    run, made = Experiment.of(tiny.model("ldm")), []

    def make():
        made.append(1)
        return pd.DataFrame({"a": [len(made)]})

    assert run.table("t", {"x": 1}, make).a[0] == 1 and not list(tmp_path.rglob("*.csv"))
    publishing = Experiment.of(run, publish=True)
    assert publishing.table("t", {"x": 1}, make).a[0] == 2 and run.table("t", {"x": 1}, make).a[0] == 2
    assert publishing.table("t", {"x": 1}, make).a[0] == 3  # made anew
    assert run.table("t", {"x": 2}, make).a[0] == 4
    assert Experiment.of(run, guidance=9.0).table("t", {"x": 1}, make).a[0] == 5
    kept = experiment.published_table(run.model, "t")
    assert kept.a[0] == 3 and 0 <= kept.attrs["provenance"]["seconds"] < 60
    monkeypatch.setenv("RANK", "1")  # one of several processes writes
    assert publishing.table("t", {"x": 1}, make).a[0] == 6 and run.table("t", {"x": 1}, make).a[0] == 3
    with torch.no_grad():
        next(run.model.denoiser.parameters()).add_(1)
    assert experiment.published_table(run.model, "t") is None
    (tmp_path / "results" / "t.csv").write_text("a\n1\n")
    with pytest.raises(TextlocError, match="digest"):
        experiment.published_table(run.model, "t")


def test_models_that_differ_in_other_parts_than_the_denoiser_are_told_apart():
    base, other, third = (models.Model.from_pipeline(tiny.BUILDERS["sd3"]()) for _ in range(3))
    assert experiment.fingerprint(base) == experiment.fingerprint(other)
    with torch.no_grad():
        next(other.pipe.text_encoder.parameters()).add_(1)
    third.pipe.scheduler = type(third.pipe.scheduler).from_config(third.pipe.scheduler.config, shift=9.0)
    assert len({experiment.fingerprint(each) for each in (base, other, third)}) == 3


def test_pictures_that_are_kept_are_those_that_are_drawn(tmp_path, monkeypatch):
    """Batch by batch, to the bit, and not again."""
    model = tiny.model("sd3")
    monkeypatch.setattr(experiment, "rows_per_call", lambda model: 2)
    prompts, seeds = [f'A sign that says "{word}".' for word in ("HELLO", "WORLD", "RIVER")], [1, 2, 3]
    run = Experiment.of(model, steps=2, store=Store(tmp_path))
    wanted = run.draw(prompts, seeds, batch_size=2).images
    pictures, read = run.drawn(prompts, seeds)
    assert pictures.dtype == wanted.dtype and (pictures == wanted).all() and read == ocr.read(wanted)
    assert len(list(tmp_path.rglob("*.jsonl"))) == 2
    monkeypatch.setattr(experiment, "generate", lambda *a, **k: pytest.fail("drawn again"))
    again, read_again = run.drawn(prompts, seeds)
    assert (again == wanted).all() and read_again == read


def test_seconds_of_a_table_hold_what_earlier_runs_took(tmp_path, monkeypatch):
    """A run that goes on tells the work of the whole table, each unit once, however often it is asked for."""
    clock = [0.0]
    monkeypatch.setattr(experiment, "data_dir", lambda: tmp_path / "data")
    monkeypatch.setattr(experiment.time, "monotonic", lambda: clock[0])
    model = tiny.model("ldm")

    def seconds(items, takes):
        def compute(item):
            clock[0] += takes
            return [{"item": item}]

        run = Experiment.of(model, store=Store(tmp_path / "units"), publish=True)
        made = run.table("t", {}, lambda: pd.concat([run.units("k", items, {}, compute) for _ in "ab"]))
        assert len(made) == 2 * len(items)
        about = experiment.published_store().load_published("t").attrs["provenance"]
        assert about["device"].startswith("CPU") and about["reader"].startswith("tesseract") and about["commit"]
        return about["seconds"]

    assert seconds([1, 2], 10) == 20
    assert seconds([1, 2, 3], 5) == 25
    assert seconds([1, 2, 3], 5) == 25
