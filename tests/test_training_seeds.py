"""Miniatures trained from other seeds: their layers are searched and published, and told in short."""

import json
import shutil

import pandas as pd
import pytest
import torch

from textloc_utils import cli, experiment, models, training_seeds
from textloc_utils.settings import TextlocError


def test_when_a_layer_appeared():
    rows = pd.DataFrame({"samples": [10, 20, 30], "target": [[0.1, 0.0], [0.3, 0.1], [0.2, 0.9]]})
    assert training_seeds.appeared(rows) == {"samples": 20, "layer": 0, "last": 1}
    with pytest.raises(TextlocError, match="no layer brought 95%"):
        training_seeds.appeared(rows, 0.95)


def test_other_training_seeds_are_searched_and_published(tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(models.spec("sd3-mini").source, run)
    log = {"report": {"name": "sd3-mini", "seed": 7}}
    log["evaluations"] = [{"samples": 5, "characters": 0.5, "target": [0.0] * 11 + [0.4]}]
    (run / "training.json").write_text(json.dumps(log))
    monkeypatch.setattr(experiment, "data_dir", lambda: tmp_path)
    monkeypatch.setenv("TEXTLOC_RESULTS", str(tmp_path / "store"))
    with pytest.raises(TextlocError, match="holds no miniature"):
        training_seeds.publish("sd3-mini", [tmp_path], 1)
    with pytest.raises(TextlocError, match="holds sd3-mini, not ldm-mini"):
        training_seeds.publish("ldm-mini", [run], 1)
    copy = shutil.copytree(run, tmp_path / "copy")
    with pytest.raises(TextlocError, match=r"training seed of its own, got \[0, 7, 7\]"):
        training_seeds.publish("sd3-mini", [run, copy], 1)

    table = training_seeds.publish("sd3-mini", [run], 1).set_index(["training_seed", "layer"])
    # The same weights under another name: their layers are the shipped miniature's.
    assert table.index.tolist() == [(seed, layer) for seed in (0, 7) for layer in range(12)]
    alike = ["mean", "low", "high", "chosen", "score", "reached"]
    assert table.loc[0][alike].equals(table.loc[7][alike]) and table.chosen.any() and not table.chosen.all()
    assert table.loc[7].characters.eq(0.5).all() and (table["mean"].loc[0] > 0.2).sum() == table.loc[0].chosen.sum()
    logs = experiment.published_store().load_published("seeds_sd3-mini_training")
    assert logs[logs.training_seed == 7].target.tolist() == [0.0] * 11 + [0.4]
    assert logs[logs.training_seed == 0].samples.max() == table.samples.loc[0].iloc[0]

    model = models.load("sd3-mini")
    long, short = training_seeds.published(model)
    assert len(long) == 24 and short.training_seed.tolist() == [0, 7] and short.appeared[1] == 5
    chosen = [str(layer) for layer, chosen in enumerate(table.chosen.loc[7]) if chosen]
    assert set(short.layers) == {" ".join(chosen)} and short.characters[1] == 0.5
    with torch.no_grad():  # of other weights nothing is published
        next(model.denoiser.parameters()).add_(1.0)
    assert training_seeds.published(model) is None


def test_the_command_prints_the_set_of_every_training_seed(capsys, monkeypatch, tmp_path):
    rows = [
        {"training_seed": seed, "layer": layer, "mean": 0.4, "low": 0.3, "high": 0.5, "chosen": layer == seed}
        for seed in (0, 1)
        for layer in (0, 1)
    ]
    monkeypatch.setattr(training_seeds, "publish", lambda *a, **k: pd.DataFrame(rows))
    assert cli.main(["study", "seeds", "sd3-mini", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "training seed 0: layers 0\n" in out and "training seed 1: layers 1\n" in out
    assert out.count("layer 1 ") == 2 and "0.40 [0.30, 0.50]" in out
