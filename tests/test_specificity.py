"""Pairs of scenes, and localizing every factor by one rule: on layers that are known, and on drawn pictures."""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pytest

from textloc_utils import cli, localization, metrics, models, prompts, scene_pairs, specificity, sweeps
from textloc_utils.experiment import Experiment
from textloc_utils.miniatures import world
from textloc_utils.results import Store
from textloc_utils.settings import TextlocError
from textloc_utils.sites import Site


def test_pairs_differ_in_what_was_asked_for_alone():
    for differs in (("text",), ("material",), ("ink",), ("typeface",), ("sign",), ("text", "ink")):
        for pair in scene_pairs.make(40, "report", differs=differs):
            for name in ("text", "shape", *scene_pairs.FACTORS):
                same = getattr(pair.scene, name) == getattr(pair.target_scene, name)
                assert same == (name not in differs)
            for scene in (pair.scene, pair.target_scene):
                assert scene.ink in world.READABLE[scene.sign]
                world.render(scene)  # it fits
            assert (pair.source_text == pair.target_text) == ("text" not in differs)
            assert pair.about["differs"] == " ".join(differs) and pair.about["target_ink"] == pair.target_scene.ink


def test_each_use_has_words_of_its_own():
    of = {use: set(scene_pairs.words(use)) for use in scene_pairs.USES}
    assert not of["select"] & of["tune"] and not (of["select"] | of["tune"]) & of["report"]
    assert of["select"] | of["tune"] == set(prompts.words("validation"))
    assert not any(words & set(prompts.words("train")) for words in of.values())
    for use, words in of.items():
        pairs = scene_pairs.make(60, use)
        assert {p.source_text for p in pairs} | {p.target_text for p in pairs} <= words
        assert len({p.seed for p in pairs}) == 60


def test_open_prompts_name_the_text_alone_and_groups_can_be_asked_for():
    for pair in scene_pairs.make(30, "tune", template=world.OPEN, two_groups=True):
        assert pair.source == f'The word "{pair.source_text}".'
        assert world.OWN[pair.source_text[0]] != world.OWN[pair.target_text[0]]


@pytest.mark.parametrize(
    "options, said",
    [({"use": "test"}, "select, tune, report"), ({"n": 0}, "at least one"), ({"differs": ("wall",)}, "material, ink")],
)
def test_pairs_that_cannot_be_made_are_refused(options, said):
    with pytest.raises(TextlocError, match=said):
        scene_pairs.make(**{"n": 3, "use": "select"} | options)


@pytest.fixture(scope="module")
def model():
    return models.load("sd3-mini", device="cpu")


def test_rows_say_what_is_seen_of_each_factor(model):
    pair = scene_pairs.make(1, "report", differs=("ink",))[0]
    _, rows = sweeps.patch_pair(Experiment.of(model, steps=2), pair, [Site(kind="found", layers=(3,))])
    for row in rows:
        seen = row["ink_read"]
        assert row["target_score"] == (seen == pair.target_scene.ink) == row["exact"]
        assert row["source_score"] == (seen == pair.scene.ink) and row["floor"] == 0
        assert row["source_text"] == row["target_text"]


def test_masks_leave_room_for_the_longer_word():
    """Whichever of the two is longer, and whichever is in the picture; they come from the picture to keep alone."""
    pairs = scene_pairs.make(30, "report")
    longer = next(p for p in pairs if len(p.target_text) > len(p.source_text))
    shorter = next(p for p in pairs if len(p.target_text) < len(p.source_text))
    for pair in (longer, shorter):
        pictures = np.stack([world.render(scene) for scene in (pair.scene, replace(pair.target_scene, dy=0))])
        looked, mask = scene_pairs.seen(pictures, pair)
        left, top, right, bottom = world.text_box(pair.scene)
        right = left + world.PITCH * max(len(pair.source_text), len(pair.target_text))
        wanted = np.ones((world.HEIGHT, world.WIDTH), bool)
        wanted[top:bottom, left:right] = False
        np.testing.assert_array_equal(mask, wanted)
        assert [each["material_read"] for each in looked] == [pair.scene.material, pair.target_scene.material]


def test_masks_of_other_models_come_from_the_ocr_engine(model, monkeypatch):
    pair = scene_pairs.make(1, "report")[0]
    pictures = np.stack([world.render(pair.scene), world.render(pair.target_scene)])
    monkeypatch.setattr(scene_pairs.ocr, "outside", lambda pictures, source: ("other", len(pictures), source))
    monkeypatch.setattr(scene_pairs, "world_of", lambda model: None)
    how, n, source = scene_pairs.outside_text(model, pictures, pair)
    assert (how, n) == ("other", 2) and (source == pictures[0]).all()
    monkeypatch.setattr(scene_pairs, "world_of", lambda model: world.SECOND)
    np.testing.assert_array_equal(scene_pairs.outside_text(model, pictures, pair), scene_pairs.seen(pictures, pair)[1])


def test_pairs_for_a_model_are_of_its_world(model, monkeypatch):
    """A model without one gets prompts that it knows: of the template that names the text alone, where one is given."""
    monkeypatch.setattr(scene_pairs, "world_of", lambda model: world.SECOND)
    options = {"template": world.OPEN, "two_groups": True}
    assert scene_pairs.for_model(model, 4, "tune", 1, **options) == scene_pairs.make(4, "tune", 1, **options)
    monkeypatch.setattr(scene_pairs, "world_of", lambda model: None)
    named, opened = (scene_pairs.for_model(model, 4, "tune", 1, template=template) for template in (None, world.OPEN))
    assert [p.source for p in opened] == [f'A sign that says "{p.source_text}".' for p in opened]
    assert all(" wall that says " in p.source for p in named) and len({p.source for p in named}) == 4
    seeds = {p.seed for use in scene_pairs.USES for p in scene_pairs.for_model(model, 50, use)}
    assert len(seeds) == 50 * len(scene_pairs.USES)
    with pytest.raises(TextlocError, match="select, tune, report"):
        scene_pairs.for_model(model, 1, "test")


#: Which layers of twelve hold which factor; nothing holds the sign.
HELD = {"text": {4, 5}, "material": {8}, "ink": {4, 5}, "typeface": {2}, "sign": set()}


def known(experiment, pair, sites=None, *, source=True):
    """What :func:`sweeps.patch_pair` would give if HELD were true."""
    sites = sweeps._sites(experiment, sites)
    rows = []
    for site in [*([Site(kind="source")] if source else []), Site(kind="target"), *sites]:
        moved = {name: site.kind == "target" or bool(held) and held <= set(site.layers) for name, held in HELD.items()}
        text = pair.target_text if moved["text"] else pair.source_text
        kind = pair.differs[0]
        share = 1.0 if site.kind == "target" else len(HELD[kind] & set(site.layers)) / max(1, len(HELD[kind]))
        row = {"model": experiment.name, "seed": pair.seed, **pair.about, **site.columns(experiment.steps)}
        for name in scene_pairs.FACTORS:
            row[f"{name}_read"] = getattr(pair.target_scene if moved[name] else pair.scene, name)
        row |= {"source_text": pair.source_text, "target_text": pair.target_text, "read": text}
        row |= {"target_score": share, "source_score": 1 - share, "floor": 0.0, "exact": moved[kind]}
        rows.append(row | {"ssim_outside": 1.0, "psnr_outside": 60.0, "row_evaluations": 1.0})
    return None, rows


@pytest.fixture
def experiment(model, tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "patch_pair", known)
    monkeypatch.setattr(localization, "check_distinct", lambda model, pairs: None)  # nothing is drawn by the model
    monkeypatch.setenv("TEXTLOC_DATA", str(tmp_path / "data"))
    return Experiment.of(model, steps=4, store=Store(tmp_path / "units"), publish=True)


def test_random_sets_are_different_and_of_other_layers(model):
    for layers in ((4, 5), (0,), (1, 2, 3, 7)):
        sets = specificity.random_sets(model, layers, 3)
        assert len({site.layers for site in sets}) == specificity.RANDOM_SETS == 5
        for site in sets:
            assert site.kind == "random" and len(set(site.layers)) == len(layers) and not set(site.layers) & {*layers}
            assert max(site.layers) < len(model.layers)
        assert specificity.random_sets(model, layers, 3) == sets != specificity.random_sets(model, layers, 4)


@pytest.mark.parametrize(
    ("size", "number"),
    [(6, 1), (11, 5), (12, 1)],  # all the others; more than there are others: of all layers; every layer
)
def test_there_are_no_more_random_sets_than_can_be_different(model, size, number):
    sets = [site.layers for site in specificity.random_sets(model, tuple(range(size)))]
    assert len(sets) == len(set(sets)) == number and {len(layers) for layers in sets} == {size}
    if size == 6:
        assert sets == [tuple(range(6, 12))]


def test_random_sets_are_taken_together_with_the_spread_over_sets():
    """Five sets of ten pictures: what one set brings, and the next does not, is no chance of the pictures."""
    hits = (10, 0, 0, 5, 0)
    rows = [
        {"differs": "text", "kind": "random", "layers": f"{i}", "exact": n < of}
        for i, of in enumerate(hits)
        for n in range(10)
    ]
    plain = [{"differs": "text", "kind": kind, "layers": "4", "exact": kind == "found"} for kind in ("source", "found")]
    told = specificity.rates(pd.DataFrame([*plain, *rows])).set_index("kind")
    assert told.exact.to_dict() == {"source": 0.0, "found": 1.0, "random": 0.3} and told.n["random"] == 50
    spread = metrics.student([of / 10 for of in hits])
    assert told.layers["random"] == "random"
    assert (told.exact_low["random"], told.exact_high["random"]) == pytest.approx((spread.low, spread.high))
    assert told.exact_high["source"] == metrics.rate([False]).high


def test_every_factor_is_found_where_it_is(experiment):
    sets = {factor: specificity.search(experiment, factor, 6) for factor in specificity.SEARCHED}
    assert sets.pop("sign") is None
    assert {factor: set(found.layers) for factor, found in sets.items()} == {k: HELD[k] for k in sets}
    layers = {factor: found.layers for factor, found in sets.items()}
    assert specificity.found_sets(experiment, 6) == {factor: of for factor, of in layers.items() if factor != "text"}
    rates = specificity.rates(specificity.reported(experiment, layers, 10)).set_index(["differs", "kind"])
    for factor in sets:
        assert rates.exact[factor, "found"].item() == rates.exact[factor, "all"].item() == 1.0
        assert rates.exact[factor, "others"].item() == rates.exact[factor, "source"].item() == 0.0
        assert rates.n[factor, "all"].item() == 10 and 0.5 < rates.exact_low[factor, "all"].item() < 1
    # Ink is where the text is, material is not.
    assert rates.exact["ink", "text set"].item() == 1.0 and rates.exact["material", "text set"].item() == 0.0
    assert rates.exact["text", "random"].item() == 0.0 and rates.n["text", "random"].item() == 50


def test_what_the_texts_layers_carry_besides(experiment):
    moved = specificity.moved(specificity.carried(experiment, (4, 5), 8)).set_index(["factor", "kind"])
    assert moved.moved.xs("found", level="kind").to_dict() == {"material": 0, "ink": 1, "typeface": 0, "sign": 0}
    assert moved.moved["material", "all"] == 1.0 and (moved.moved.xs("source", level="kind") == 0).all()
    assert (moved.exact.xs("found", level="kind") == 1).all()


def test_exact_match_selects_what_scores_would_not(experiment, monkeypatch):
    """One of two layers brings half of the letters in every pair, and no whole word."""
    pairs = scene_pairs.make(6, "select")
    half = localization.localize(experiment, pairs, how="exhaustive", share=0.5)
    assert len(half.layers) == 1
    assert set(localization.localize(experiment, pairs, how="exhaustive", share=0.5, by="exact").layers) == {4, 5}
    assert localization.localize(experiment, pairs, how="exhaustive", by="exact", share=0.5).reached.mean == 1.0
    screen = pd.DataFrame(
        {"seed": s, "layer": i, "effect": float(i in (4, 5)), "depth": "one-step", "row_evaluations": 1.0}
        for s in range(6)
        for i in range(12)
    )
    monkeypatch.setattr(sweeps, "cheap", lambda *a, **k: screen)
    for by, layers in (("score", 1), ("exact", 2)):
        found, table = localization.published(experiment, pairs, "budgeted", share=0.5, budget=1.0, by=by)
        assert len(found.layers) == layers and found.sure is not None
        assert table.columns.tolist() == ["layer", "effect"] and len(table) == 12
    with pytest.raises(TextlocError, match="score or exact"):
        localization.localize(experiment, pairs, by="cer")
    mixed = [*pairs[:2], scene_pairs.make(1, "select", 99, differs=("ink",))[0]]
    with pytest.raises(TextlocError, match="differ in ink, text"):
        localization.localize(experiment, mixed)


def test_every_search_is_done_and_the_budgeted_one_has_its_own_pairs(experiment, monkeypatch):
    asked = {}

    def published(run, pairs, how, *, by):
        asked[how] = {pair.seed for pair in pairs}, {pair.source_text for pair in pairs}, by
        return how, None

    monkeypatch.setattr(localization, "published", published)
    assert list(specificity.searches(experiment, 5)) == list(asked) == list(localization.SEARCHES)
    others = [asked[how] for how in asked if how != "budgeted"]
    assert all(each == others[0] for each in others) and {by for *_, by in asked.values()} == {"exact"}
    assert not asked["budgeted"][0] & others[0][0]


def test_a_word_is_needed_where_it_is_read(experiment, monkeypatch):
    """Without the text's layers the word goes; without all others, or as many of them, it stays."""

    def emptied(run, pair, sites=None, *, source=True):
        assert pair.target == "" and pair.source_text == pair.target_text
        shown = [Site(kind="source"), Site(kind="target"), *sites]
        kept = [s.kind != "target" and not HELD["text"] & set(s.layers) for s in shown]
        about = {"seed": pair.seed, "row_evaluations": 1.0}
        return None, [about | s.columns(4) | {"exact": k} for s, k in zip(shown, kept, strict=True)]

    monkeypatch.setattr(sweeps, "patch_pair", emptied)
    told = specificity.rates(specificity.needed(experiment, (4, 5), 6)).set_index("kind").exact
    assert told["found"] == told["all"] == told["target"] == 0
    assert told["others"] == told["random"] == told["source"] == 1


def test_styles_are_the_typefaces_that_prompts_name(experiment):
    table = specificity.reported(experiment, {"text": (4, 5)}, 12)
    told = specificity.by_style(table)
    assert set(told.typeface) == set(world.TYPEFACES) and set(told.kind) == {"found", "all"}
    assert told.n.sum() == 24 and (told.exact == 1).all()


def test_the_command_tells_every_set(capsys, monkeypatch, model):
    lines: list[tuple] = []
    monkeypatch.setattr(specificity, "searches", lambda run, n, seed: {"exhaustive": Found(layers=(4, 5))})
    monkeypatch.setattr(
        specificity, "search", lambda run, factor, n, seed: Found(layers=(8,)) if factor == "ink" else None
    )
    for name in ("needed", "alone", "reported", "carried"):
        monkeypatch.setattr(specificity, name, lambda run, *given, name=name: lines.append((name, *given)))
    for name in ("rates", "moved"):
        monkeypatch.setattr(specificity, name, lambda table, name=name: pd.DataFrame({name: [1]}))
    monkeypatch.setattr(scene_pairs, "world_of", lambda model: None)
    assert cli.main(["study", "layers", "sd3-mini", "--preset", "smoke"]) == 0
    assert lines == [("needed", (4, 5), 8, 42)]  # nobody reads the other factors of such pictures
    monkeypatch.setattr(scene_pairs, "world_of", lambda model: world.SECOND)
    assert cli.main(["study", "layers", "sd3-mini", "--preset", "smoke"]) == 0
    assert lines[2:] == [
        ("alone", 4, 42),
        ("reported", {"text": (4, 5), "ink": (8,)}, 8, 42),
        ("carried", (4, 5), 8, 42),
    ]
    told = capsys.readouterr().out
    assert "material: patching all layers has no effect on it" in told and "ink: layers (8,)" in told


@dataclass
class Found:
    layers: tuple
