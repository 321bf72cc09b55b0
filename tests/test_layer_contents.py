"""Studies patch the sites they name, and their short tables say what the long ones hold."""

import pandas as pd
import pytest

from textloc_utils import cli, experiment, layer_contents, metrics, models, scene_pairs, sweeps
from textloc_utils.experiment import Experiment
from textloc_utils.miniatures import world
from textloc_utils.results import Store
from textloc_utils.settings import TextlocError
from textloc_utils.sites import SOURCE, TARGET, Site


@pytest.fixture(scope="module")
def model():
    return models.load("sd3-mini", device="cpu")


def sites(name, model, layers=(4, 5), steps=10):
    return layer_contents.STUDIES[name].sites(model, layers, steps)


def test_sites_of_each_study(model):
    every = tuple(range(12))
    found, whole = Site(kind="found", layers=(4, 5)), Site(kind="all", layers=every)
    for name in layer_contents.STUDIES:
        patched = sites(name, model)
        assert {found, whole} <= set(patched) and len({site.name for site in patched}) == len(patched)
    assert Site(kind="from step", layers=(4, 5), start=3) in sites("steps", model)
    assert Site(kind="until step", layers=(4, 5), stop=8) in sites("steps", model)
    parts = sites("parts", model)
    assert [site.heads for site in parts if site.kind == "head"] == [(0,), (1,), (2,)]
    assert {site.kind: site.tensors for site in parts} | {"keys": "k", "values": "v"} == {
        site.kind: site.tensors for site in parts
    }
    assert Site(kind="pooled", pooled=True) in parts
    assert all(not site.pooled for site in sites("parts", models.load("ldm-mini", device="cpu")))


@pytest.mark.parametrize("only", [None, world.PLAIN, world.SECOND])
def test_pairs_are_reported_ones_and_for_the_tokens_equally_long(model, monkeypatch, only):
    """Of a model's own world, and of a model without one."""
    monkeypatch.setattr(scene_pairs, "world_of", lambda model: only)
    pairs = {name: study.pairs(model, 12, 1) for name, study in layer_contents.STUDIES.items()}
    assert pairs["steps"] == pairs["parts"] == pairs["length"] == scene_pairs.for_model(model, 12, "report", 1)
    lengths = {name: {len(p.target_text) - len(p.source_text) for p in of} for name, of in pairs.items()}
    assert lengths["tokens"] == {0} and len(pairs["tokens"]) == 12 and len(lengths["length"]) > 2
    assert all(isinstance(p, scene_pairs.ScenePair) == (only is not None) for of in pairs.values() for p in of)
    if only is not None:
        assert ({p.scene.typeface for p in pairs["tokens"]} == {"plain"}) == (only is world.PLAIN)


def test_tokens_of_each_text_are_patched(model):
    kinds = [site.kind for site in sites("tokens", model)]
    assert kinds == ["found", "all", "different tokens", "same tokens", "different 0 tokens", "different 1 tokens"]
    of_one_text = sites("tokens", models.load("ldm-mini", device="cpu"))
    assert [site.kind for site in of_one_text] == ["found", "all", "different tokens", "same tokens"]


def test_the_fewest_heads_are_found_one_layer_at_a_time(model, tmp_path, monkeypatch):
    """Heads 4.1 and 5.0 write together; 5.2 is needed in one pair of four, which the share forgives no more."""
    monkeypatch.setattr(experiment, "data_dir", lambda: tmp_path)
    need, asked = {(4, 1), (5, 0)}, []

    def known(experiment, pairs, chosen, *, source=True):
        asked.append(len(chosen))
        rows = []
        for pair in pairs:
            for site in chosen:
                layers = range(12) if site.kind == "all" else site.layers
                heads = set(site.layer_heads) or {(layer, head) for layer in layers for head in range(3)}
                wants = need | ({(5, 2)} if pair.seed % 4 == 0 else set())
                about = {"seed": pair.seed, "target_score": 0.0, "floor": 0.0}
                rows.append(about | site.columns(8) | {"exact": wants <= heads})
        return pd.DataFrame(rows)

    monkeypatch.setattr(sweeps, "table", known)
    run = Experiment.of(model, store=Store(tmp_path / "units"))
    told = layer_contents.rates(layer_contents.heads(run, (4, 5), 8)).set_index("kind")
    assert told.heads["fewest heads"] == "4.1 5.0 5.2" and told.heads["other heads"] == "4.0 4.2 5.1"
    assert told.exact["found"] == told.exact["fewest heads"] == 1.0 and told.exact["other heads"] == 0.0
    assert told.n["random heads"] == 8 * layer_contents.RANDOM_HEADS and told.exact["random heads"] < 1
    assert asked == [7, *[1] * 6, 3 + layer_contents.RANDOM_HEADS]


def test_a_published_study_is_taken_where_it_fits(model, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "data_dir", lambda: tmp_path)
    run = Experiment.of(model, steps=1, store=Store(tmp_path / "units"))
    table = layer_contents.study(Experiment.of(run, publish=True), "length", (4,), 2)
    monkeypatch.setattr(sweeps, "table", lambda *a, **k: pytest.fail("was done again"))
    assert layer_contents.study(run, "length", [4], 2).equals(table)
    for other in ({"layers": (5,), "n": 2}, {"layers": (4,), "n": 3}, {"layers": (4,), "n": 2, "seed": 1}):
        with pytest.raises(pytest.fail.Exception):
            layer_contents.study(run, "length", **other)


@pytest.mark.parametrize(
    ("name", "layers", "said"),
    [("colours", (4,), "steps, parts, length, tokens"), ("steps", (), "at least one"), ("steps", (12,), "0 to 11")],
)
def test_a_wrong_study_is_refused(model, name, layers, said):
    with pytest.raises(TextlocError, match=said):
        layer_contents.study(Experiment.of(model), name, layers, 2)


FOUND = Site(kind="found", layers=(4, 5))


def effects(values: dict[Site, float]):
    rows = [
        {"seed": seed, **site.columns(16), "target_score": 0.1 + effect, "floor": 0.1}
        for seed in (1, 2)
        for site, effect in values.items()
    ]
    return pd.DataFrame(rows)


def test_windows_are_shares_of_the_whole_patch():
    table = layer_contents.windows(
        effects(
            {
                SOURCE: 0,
                FOUND: 0.8,
                Site(kind="from step", layers=(4, 5), start=2): 0.4,
                Site(kind="until step", layers=(4, 5), stop=12): 0.2,
            }
        )
    )
    assert table[["kind", "step"]].values.tolist() == [["from step", 2], ["until step", 12]]
    assert table["mean"].tolist() == pytest.approx([0.5, 0.25]) and table.n.tolist() == [2, 2]


def test_longer_words_are_told_from_shorter_ones():
    words = {1: ("CAT", "HOUSE"), 2: ("CAT", "BIRD"), 3: ("HOUSE", "CAT"), 4: ("CAT", "DOG")}
    written = {SOURCE: {4}, TARGET: {1, 2, 3, 4}, FOUND: {1, 3}, Site(kind="all"): {1, 2, 3}}
    rows = [
        {"source_text": source, "target_text": target, **site.columns(16), "exact": seed in of}
        for seed, (source, target) in words.items()
        for site, of in written.items()
    ]
    told = layer_contents.by_length(pd.DataFrame(rows)).set_index(["target", "kind"])
    assert told.exact.unstack("kind").to_dict("index") == {
        "shorter": {"source": 0.0, "found": 1.0, "all": 1.0},
        "as long": {"source": 1.0, "found": 0.0, "all": 0.0},
        "longer": {"source": 0.0, "found": 0.5, "all": 1.0},
    }
    two, half = told.loc[("longer", "found")], metrics.rate([True, False])
    assert (two.n, two.exact_low, two.exact_high) == (2, half.low, half.high)


def test_the_command_prints_effects_per_site(capsys, monkeypatch):
    table = effects({FOUND: 0.5, Site(kind="keys", layers=(4, 5), tensors="k"): 0.1})
    monkeypatch.setattr(layer_contents, "study", lambda *a, **k: table)
    assert (
        cli.main(["study", "contents", "sd3-mini", "--tables", "parts", "--layers", "4", "5", "--device", "cpu"]) == 0
    )
    out = capsys.readouterr().out
    assert "parts, layers 4 5" in out and "keys" in out and "0.50 [0.50, 0.50]" in out
