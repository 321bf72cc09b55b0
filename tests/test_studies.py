"""Studies patch the sites they name, and their short tables say what the long ones hold."""

import json
import shutil

import pandas as pd
import pytest
import torch

from textloc_utils import cli, localize, models, plots, prompts, studies
from textloc_utils.localize import Site
from textloc_utils.results import Store
from textloc_utils.settings import TextlocError


@pytest.fixture(scope="module")
def model():
    return models.load("sd3-mini", device="cpu")


def sites(name, model, layers=(4, 5), steps=10):
    return studies.STUDIES[name].sites(model, layers, steps)


def test_sites_of_each_study(model):
    every = tuple(range(12))
    for name in studies.STUDIES:
        assert sites(name, model)[studies.FOUND] == Site(layers=(4, 5))
        assert sites(name, model)["all layers"] == Site(layers=every)
    others = sites("colours", model)["all but the found"].layers
    assert set(others) == set(every) - {4, 5}
    assert sites("steps", model)["from step 3"] == Site(layers=(4, 5), start=3)
    assert sites("steps", model)["until step 8"] == Site(layers=(4, 5), stop=8)
    parts = sites("parts", model)
    assert parts["head 2"] == Site(layers=(4, 5), heads=(2,)) and "head 3" not in parts
    assert parts["keys"].tensors == "k" and parts["values"].tensors == "v" and parts["pooled"] == Site(pooled=True)
    assert "pooled" not in sites("parts", models.load("ldm-mini", device="cpu"))


def test_pairs_of_the_colours_differ_in_colours():
    assert all(p.target_wall and p.target_wall != p.wall for p in studies.STUDIES["colours"].pairs(5, 1))
    assert studies.STUDIES["steps"].pairs(5, 1) == prompts.make_pairs(5, 1)


def test_pictures_whose_colours_nobody_reads_carry_text_only():
    row = {"site": "layer 0", "target_score": 0.9, "floor": 0.1, "target_wall": "red", "target_sign": "blue"}
    told = studies.carried(pd.DataFrame([row, row | {"target_score": 0.7}]))
    assert told.text[0] == pytest.approx(0.7) and told[["wall", "sign"]].isna().all(axis=None) and told.n[0] == 2
    assert plots.carried({"full size": told}).axes


def test_a_published_study_is_taken_where_it_fits(model, tmp_path, monkeypatch):
    monkeypatch.setattr(localize, "data_dir", lambda: tmp_path)
    options = {"steps": 1, "store": Store(tmp_path / "units")}
    table = studies.study(model, "length", (4,), 2, publish=True, **options)
    monkeypatch.setattr(localize, "sweep", lambda *a, **k: pytest.fail("was done again"))
    assert studies.study(model, "length", [4], 2, **options).equals(table)
    for other in ({"layers": (5,), "n": 2}, {"layers": (4,), "n": 3}, {"layers": (4,), "n": 2, "seed": 1}):
        with pytest.raises(pytest.fail.Exception):
            studies.study(model, "length", **other, **options)


@pytest.mark.parametrize(
    ("name", "layers", "said"),
    [("colour", (4,), "colours"), ("steps", (), "at least one"), ("steps", (12,), "0 to 11")],
)
def test_a_wrong_study_is_refused(model, name, layers, said):
    with pytest.raises(TextlocError, match=said):
        studies.study(model, name, layers, 2)


def effects(values: dict[str, float], words=("CAT", "HOUSE")):
    rows = [
        {"seed": seed, "site": site, "target_score": 0.1 + effect, "floor": 0.1, "source_text": words[0]}
        | {"target_text": words[1]}
        for seed in (1, 2)
        for site, effect in values.items()
    ]
    return pd.DataFrame(rows)


def test_windows_are_shares_of_the_whole_patch():
    table = studies.windows(effects({"source": 0, studies.FOUND: 0.8, "from step 2": 0.4, "until step 12": 0.2}))
    assert table[["kind", "step"]].values.tolist() == [["from step", 2], ["until step", 12]]
    assert table["mean"].tolist() == pytest.approx([0.5, 0.25]) and table.n.tolist() == [2, 2]


def test_length_counts_letters():
    table = studies.by_length(effects({studies.FOUND: 0.5, "all layers": 0.8, "target": 0.9}))
    assert table.to_dict("records") == [
        {"source": 3, "target": 5, "found": pytest.approx(0.5), "all": pytest.approx(0.8), "n": 2}
    ]


def test_when_a_layer_appeared():
    rows = pd.DataFrame({"samples": [10, 20, 30], "target": [[0.1, 0.0], [0.3, 0.1], [0.2, 0.9]]})
    assert studies.appeared(rows) == {"samples": 20, "layer": 0, "last": 1}
    with pytest.raises(TextlocError, match="no layer brought 95%"):
        studies.appeared(rows, 0.95)


def test_other_training_seeds_are_searched_and_published(tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(models.spec("sd3-mini").source, run)
    log = {"report": {"name": "sd3-mini", "seed": 7}}
    log["evaluations"] = [{"samples": 5, "characters": 0.5, "target": [0.0] * 11 + [0.4]}]
    (run / "training.json").write_text(json.dumps(log))
    monkeypatch.setattr(localize, "data_dir", lambda: tmp_path)
    monkeypatch.setenv("TEXTLOC_RESULTS", str(tmp_path / "store"))
    with pytest.raises(TextlocError, match="holds no miniature"):
        studies.publish_seeds("sd3-mini", [tmp_path], 1)
    with pytest.raises(TextlocError, match="holds sd3-mini, not ldm-mini"):
        studies.publish_seeds("ldm-mini", [run], 1)
    copy = shutil.copytree(run, tmp_path / "copy")
    with pytest.raises(TextlocError, match=r"training seed of its own, got \[0, 7, 7\]"):
        studies.publish_seeds("sd3-mini", [run, copy], 1)

    table = studies.publish_seeds("sd3-mini", [run], 1).set_index(["training_seed", "layer"])
    # The same weights under another name: their layers are the shipped miniature's.
    assert table.index.tolist() == [(seed, layer) for seed in (0, 7) for layer in range(12)]
    alike = ["mean", "low", "high", "chosen", "score", "reached"]
    assert table.loc[0][alike].equals(table.loc[7][alike]) and table.chosen.any() and not table.chosen.all()
    assert table.loc[7].characters.eq(0.5).all() and (table["mean"].loc[0] > 0.2).sum() == table.loc[0].chosen.sum()
    logs = localize.published_store().load_published("seeds_sd3-mini_training")
    assert logs[logs.training_seed == 7].target.tolist() == [0.0] * 11 + [0.4]
    assert logs[logs.training_seed == 0].samples.max() == table.samples.loc[0].iloc[0]

    model = models.load("sd3-mini")
    long, short = studies.training_seeds(model)
    assert len(long) == 24 and short.training_seed.tolist() == [0, 7] and short.appeared[1] == 5
    chosen = [str(layer) for layer, chosen in enumerate(table.chosen.loc[7]) if chosen]
    assert set(short.layers) == {" ".join(chosen)} and short.characters[1] == 0.5
    with torch.no_grad():  # of other weights nothing is published
        next(model.denoiser.parameters()).add_(1.0)
    assert studies.training_seeds(model) is None


def test_the_command_prints_effects_per_site(capsys, monkeypatch):
    table = effects({studies.FOUND: 0.5, "keys": 0.1})
    monkeypatch.setattr(studies, "study", lambda model, name, layers, *a, **k: table)
    assert (
        cli.main(["study", "contents", "sd3-mini", "--tables", "parts", "--layers", "4", "5", "--device", "cpu"]) == 0
    )
    out = capsys.readouterr().out
    assert "parts, layers 4 5" in out and "keys" in out and "0.50 [0.50, 0.50]" in out


def test_the_command_prints_the_set_of_every_training_seed(capsys, monkeypatch, tmp_path):
    rows = [
        {"training_seed": seed, "layer": layer, "mean": 0.4, "low": 0.3, "high": 0.5, "chosen": layer == seed}
        for seed in (0, 1)
        for layer in (0, 1)
    ]
    monkeypatch.setattr(studies, "publish_seeds", lambda *a, **k: pd.DataFrame(rows))
    assert cli.main(["study", "seeds", "sd3-mini", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "training seed 0: layers 0\n" in out and "training seed 1: layers 1\n" in out
    assert out.count("layer 1 ") == 2 and "0.40 [0.30, 0.50]" in out
