"""The sweep: its rows, its resumption, and a known effect on the shipped miniature."""

import pytest

from textloc_utils import localize, models, prompts
from textloc_utils.results import Store
from textloc_utils.settings import TextlocError


@pytest.fixture(scope="module")
def model():
    return models.load("sd3-mini", device="cpu")


def test_rows_of_one_pair(model):
    sites = {"nothing": ((), False), "layer 3": ((3,), False)}
    pictures, rows = localize.patch_pair(model, prompts.make_pairs(1)[0], sites, steps=2)
    assert pictures.shape == (4, 64, 128, 3)
    assert [r["site"] for r in rows] == ["source", "target", "nothing", "layer 3"]
    assert (pictures[2] == pictures[0]).all() and rows[2]["ssim_outside"] == 1.0
    assert (pictures[3] != pictures[0]).any()
    assert rows[0]["row_evaluations"] == 4  # two steps, with guidance


def test_a_sweep_is_stored_pair_by_pair(model, tmp_path, monkeypatch):
    pairs, store = prompts.make_pairs(3), Store(tmp_path)
    sites = {"layer 0": ((0,), False)}
    first = localize.sweep(model, pairs[:2], sites=sites, steps=1, store=store)
    done = []
    original = localize.patch_pair
    monkeypatch.setattr(
        localize, "patch_pair", lambda m, pair, *a, **k: done.append(pair) or original(m, pair, *a, **k)
    )
    again = localize.sweep(model, pairs, sites=sites, steps=1, store=store)
    assert done == [pairs[2]]
    assert again.head(len(first)).equals(first)


def test_the_known_effect(model):
    """Every layer together turns the source's word into the target's; the unpatched source keeps its own."""
    sites = {"all layers + pooled": (tuple(range(len(model.layers))), True)}
    table = localize.sweep(model, prompts.make_pairs(6, same_length=True), sites=sites)
    score = localize.summarise(table).set_index("site")
    assert score.target_score["all layers + pooled"] > 0.8
    assert score.source_score["all layers + pooled"] < 0.4
    assert score.source_score["source"] > 0.8 and score.target_score["source"] < 0.4
    assert score.ssim_outside["all layers + pooled"] > 0.5


def test_a_sweep_without_pairs_or_beyond_the_layers_is_refused(model):
    with pytest.raises(TextlocError, match="at least one pair"):
        localize.sweep(model, [])
    with pytest.raises(TextlocError, match="0 to 11"):
        localize.patch_pair(model, prompts.make_pairs(1)[0], {"x": ((12,), False)})
