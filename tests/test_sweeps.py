"""The sweep: its rows, its resumption, what it prints and shows, and a known effect on the shipped miniature."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny

import textloc_utils as tl
from textloc_utils import generate, metrics, models, prompts, scene_pairs, sites, sweeps
from textloc_utils.experiment import Experiment
from textloc_utils.miniatures import world
from textloc_utils.results import Store
from textloc_utils.settings import TextlocError
from textloc_utils.sites import Site, together


@pytest.fixture(scope="module")
def model():
    return models.load("sd3-mini", device="cpu")


def pairs_of(model, n, **options):
    """Pairs of the miniature's world."""
    return scene_pairs.for_model(model, n, "report", **options)


def test_rows_of_one_pair(model):
    chosen = [Site(), together([3]), Site(kind="head", layers=(3, 4), start=1, heads=(2,), tensors="v")]
    pictures, rows = sweeps.patch_pair(Experiment.of(model, steps=2), pairs_of(model, 1)[0], chosen)
    assert pictures.shape == (5, 64, 128, 3)
    assert [r["kind"] for r in rows] == ["source", "target", "set", "layer", "head"]
    assert (pictures[2] == pictures[0]).all() and rows[2]["ssim_outside"] == 1.0
    assert (pictures[3] != pictures[0]).any()
    assert rows[0]["row_evaluations"] == 4  # two steps, with guidance
    told = [rows[4][column] for column in sites.COLUMNS]
    assert told == ["head 2", "head", "3 4", False, 1, 2, "2", "v"]
    assert [rows[3][column] for column in ("site", "layers", "start", "stop")] == ["layer 3", "3", 0, 2]


def test_tokens_are_patched_where_the_prompts_differ_and_heads_layer_by_layer(model):
    pair = pairs_of(model, 1)[0]
    groups = sites.token_groups(model, pair)
    columns = [t for _, text in model.text_columns(pair.source) for t in text]
    others = [t for _, text in model.text_columns(pair.target) for t in text]
    assert set(groups) == {"different", "same", "different 0", "different 1"}
    assert groups["different"] == groups["different 0"] + groups["different 1"]
    assert sorted(groups["different"] + groups["same"]) == list(range(len(columns)))
    assert all((columns[i] != others[i]) == (i in groups["different"]) for i in range(len(columns)))
    every = tuple(range(len(model.layers)))
    per_layer = tuple((layer, head) for layer in every for head in range(model.layers[layer].heads))
    chosen = [
        Site(layers=every),
        Site(kind="heads", layers=every, layer_heads=per_layer),
        Site(kind="heads", layers=(3, 4), layer_heads=((3, 1), (4, 0))),
        *(Site(kind=name, layers=every, tokens=name) for name in ("different", "same")),
    ]
    pictures, rows = sweeps.patch_pair(Experiment.of(model, steps=2), pair, chosen)
    assert rows[4]["heads"] == "3.1 4.0" and rows[4]["layers"] == "3 4"
    whole, by_head, two_heads, different, same = pictures[2:]
    assert np.abs(whole.astype(int) - by_head).max() <= 1
    assert all((picture != whole).any() for picture in (two_heads, different, same))


def test_a_row_says_what_was_asked_and_what_was_seen(monkeypatch):
    """Of rendered scenes: the target, the source, and a patched picture with the target's longer word alone."""
    pairs = scene_pairs.make(20, "report", differs=("text", "material"))
    pair = next(p for p in pairs if len(p.target_text) > len(p.source_text))
    moved = replace(pair.scene, text=pair.target_text)
    drawn = np.stack([world.render(scene) for scene in (pair.target_scene, pair.scene, moved)])
    made = SimpleNamespace(images=drawn, row_evaluations=12)
    monkeypatch.setattr(Experiment, "draw", lambda *a, **k: made)
    monkeypatch.setattr(sweeps.ocr, "read", lambda pictures: [pair.source_text, pair.target_text, pair.target_text])
    pictures, rows = sweeps.patch_pair(Experiment.of(tiny.model("ldm"), steps=1), pair, [together([0])])
    np.testing.assert_array_equal(pictures, drawn[[1, 0, 2]])
    for row, scene in zip(rows, (pair.scene, pair.target_scene, moved), strict=True):
        assert row.items() >= pair.about.items() and row["read"] == scene.text and row["row_evaluations"] == 4
        assert {name: row[f"{name}_read"] for name in scene_pairs.FACTORS} == {
            name: getattr(scene, name) for name in scene_pairs.FACTORS
        }
    floor = metrics.text_score(pair.source_text, pair.target_text)
    assert [row["floor"] for row in rows] == [floor] * 3
    assert [row["target_score"] for row in rows] == [floor, 1.0, 1.0]
    assert [row["source_score"] for row in rows] == [1.0, floor, floor]
    assert [row["exact"] for row in rows] == [False, True, True]
    # Another word is no change outside the text, though it is longer; another material is.
    assert [rows[0]["ssim_outside"], rows[2]["ssim_outside"]] == pytest.approx([1.0, 1.0])
    assert rows[1]["ssim_outside"] < 0.9
    assert [row["psnr_outside"] == metrics.PSNR_CAP for row in rows] == [True, False, True]


def test_a_pair_without_scenes_has_its_texts_alone(monkeypatch):
    (pair,) = prompts.make_pairs(1, seed=3)
    monkeypatch.setattr(sweeps.ocr, "read", lambda pictures: [pair.source_text, pair.target_text, "ELSE"])
    _, rows = sweeps.patch_pair(Experiment.of(tiny.model("ldm"), steps=1), pair, [together([0])])
    about = {"model": "tiny-ldm", "seed": 3, "source_text": pair.source_text, "target_text": pair.target_text}
    assert all(row.items() >= about.items() for row in rows)
    assert [row["exact"] for row in rows] == [False, True, False] and rows[0]["ssim_outside"] == pytest.approx(1.0)
    assert not [name for name in rows[0] if name.endswith("_read") or name == "differs"]


def test_layers_are_one_or_several_of_any_integers():
    assert together(3) == together([3]) == together(np.int64(3)) == Site(kind="layer", layers=(3,))
    assert together(np.array([1, 2])) == Site(layers=(1, 2)) and together((1, 2)).name == "layers 1 2"
    with pytest.raises(TextlocError, match="layers must be"):
        together(1.5)


def test_a_sweep_is_stored_pair_by_pair(model, tmp_path, monkeypatch):
    pairs, experiment = pairs_of(model, 3), Experiment.of(model, steps=1, store=Store(tmp_path))
    first = sweeps.table(experiment, pairs[:2], [together([0])])
    done = []
    original = sweeps.patch_pair
    monkeypatch.setattr(sweeps, "patch_pair", lambda e, pair, *a, **k: done.append(pair) or original(e, pair, *a, **k))
    again = sweeps.table(experiment, pairs, [together([0])])
    assert done == [pairs[2]]
    assert again.head(len(first)).equals(first)
    for other in ({"guidance": 1.5}, {"negative_prompt": "blur"}, {"steps": 2}):  # other settings, other pictures
        done.clear()
        sweeps.table(Experiment.of(experiment, **other), pairs[:1], [together([0])])
        assert done == pairs[:1]


@pytest.mark.full
def test_the_known_effect(model):
    """Every layer together turns the source's word into the target's; the unpatched source keeps its own."""
    everything = Site(kind="all + pooled", layers=tuple(range(len(model.layers))), pooled=True)
    pairs = pairs_of(model, 6, same_length=True)
    swept = tl.sweep(model, pairs, sites=[everything])
    score = swept.summary().set_index("kind")
    assert score.target_score["all + pooled"] > 0.8
    assert score.source_score["all + pooled"] < 0.4
    assert score.source_score["source"] > 0.8 and score.target_score["source"] < 0.4
    assert score.ssim_outside["all + pooled"] > 0.5


def test_a_sweep_without_pairs_or_beyond_the_layers_is_refused(model, monkeypatch):
    monkeypatch.setattr(generate, "generate", lambda *a, **k: pytest.fail("was drawn"))
    pairs = pairs_of(model, 1)
    for asked, options, said in (
        ([], {}, "at least one pair"),
        (["a prompt"], {}, "got a str"),
        (pairs, {"sites": [together([12])]}, "0 to 11"),
        (pairs, {"steps": 0}, "steps must be at least 1"),
        (pairs, {"guidance": 1.0, "negative_prompt": "blur"}, "reads no negative prompt"),
    ):
        with pytest.raises(TextlocError, match=said):
            tl.sweep(model, asked, **options)


def test_a_pipeline_of_one_s_own_is_swept_printed_and_shown():
    pipe, pairs = tiny.BUILDERS["ldm"](), prompts.make_pairs(2)
    swept = tl.sweep(pipe, pairs, steps=1)
    layers = swept.table[swept.table.kind == "layer"].layers.nunique()
    assert len(swept.table) == 2 * (layers + 3) and swept.experiment.model.pipe is pipe
    lines = repr(swept).splitlines()
    assert lines[0].endswith("means over 2 pairs") and len(lines) == 1 + 1 + layers + 3 and "layer 0" in repr(swept)
    shown = swept.show(1)
    titles = [axis.get_title() for axis in shown.axes if axis.images]
    assert [title.split(":")[0] for title in titles] == list(swept.table.site[: layers + 3])
    pictures, _ = sweeps.patch_pair(swept.experiment, pairs[1])
    np.testing.assert_array_equal(shown.axes[2].images[0].get_array(), pictures[2])


def test_short_tables_tell_kinds_and_layers_apart():
    rows = [
        {"seed": seed, "target_score": 0.1 + effect, "source_score": 0.0, "floor": 0.1, **site.columns(8)}
        for site, effects in {
            sites.SOURCE: (0.0, 0.0),
            together([10]): (0.2, 0.4),
            together([9]): (0.0, 0.1),
            together([9, 10]): (0.6, 0.7),
            Site(kind="all", layers=(9, 10)): (0.8, 0.9),
            Site(kind="until step", layers=(9, 10), stop=3): (0.5, 0.5),
        }.items()
        for seed, effect in enumerate(effects)
    ]
    table = pd.DataFrame(rows)
    alone = sweeps.layer_table(table)
    assert alone.columns.tolist() == [9, 10] and alone[10].tolist() == pytest.approx([0.2, 0.4])
    sets = sweeps.set_effects(table)
    assert set(sets) == {"9", "10", "9 10", "all"} and sets["9 10"].tolist() == pytest.approx([0.6, 0.7])
    effects = sweeps.effect_intervals(table)
    assert effects.kind.tolist() == ["layer", "layer", "set", "all", "until step"] and effects.stop.tolist()[-1] == 3
    assert effects["mean"].tolist() == pytest.approx([0.3, 0.05, 0.65, 0.85, 0.5]) and (effects.n == 2).all()
    whole = metrics.bootstrap([0.6, 0.7])
    assert (effects.low[2], effects.high[2]) == pytest.approx((whole.low, whole.high))


def test_small_batches_give_the_same_pictures(model):
    pair, experiment = pairs_of(model, 1)[0], Experiment.of(model, steps=2)
    chosen = [together([i]) for i in range(4)]
    one, rows = sweeps.patch_pair(experiment, pair, chosen)
    several, more = sweeps.patch_pair(experiment, pair, chosen, batch_size=3)
    np.testing.assert_allclose(one.astype(int), several, atol=1)
    assert (
        [r["site"] for r in more] == [r["site"] for r in rows] == ["source", "target", *(site.name for site in chosen)]
    )
    assert sum(r["row_evaluations"] for r in rows) == 6 * 4
    assert sum(r["row_evaluations"] for r in more) == pytest.approx((6 + 2) * 4)  # the target is drawn three times
    without, rows = sweeps.patch_pair(experiment, pair, chosen, source=False)
    np.testing.assert_allclose(without.astype(int), one[1:], atol=1)
    assert rows[0]["site"] == "target" and "ssim_outside" not in rows[0]
