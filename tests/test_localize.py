"""The sweep: its rows, its resumption, and a known effect on the shipped miniature. The searches and their rule."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from textloc_utils import localize, models, prompts
from textloc_utils.localize import Site
from textloc_utils.results import Store
from textloc_utils.settings import ROOT, TextlocError


@pytest.fixture(scope="module")
def model():
    return models.load("sd3-mini", device="cpu")


def test_rows_of_one_pair(model):
    sites = {"nothing": Site(), "layer 3": Site(layers=(3,))}
    pictures, rows = localize.patch_pair(model, prompts.make_pairs(1)[0], sites, steps=2)
    assert pictures.shape == (4, 64, 128, 3)
    assert [r["site"] for r in rows] == ["source", "target", "nothing", "layer 3"]
    assert (pictures[2] == pictures[0]).all() and rows[2]["ssim_outside"] == 1.0
    assert (pictures[3] != pictures[0]).any()
    assert rows[0]["row_evaluations"] == 4  # two steps, with guidance


def test_a_sweep_is_stored_pair_by_pair(model, tmp_path, monkeypatch):
    pairs, store = prompts.make_pairs(3), Store(tmp_path)
    sites = {"layer 0": Site(layers=(0,))}
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
    sites = {"all layers + pooled": Site(layers=tuple(range(len(model.layers))), pooled=True)}
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
        localize.patch_pair(model, prompts.make_pairs(1)[0], {"x": Site(layers=(12,))})


# --- the selection rule, on tables whose answer is known ---------------------------------------------------------


def table_of(effects: dict[str, list[float]], floor=0.1):
    """A sweep's table of pairs 0, 1, ... with these text effects, gained at the source's expense."""
    rows = [
        {
            "seed": seed,
            "site": site,
            "target_score": floor + e,
            "source_score": 1 - e,
            "floor": floor,
            "row_evaluations": 1.0,
        }
        for site, values in effects.items()
        for seed, e in enumerate(values)
    ]
    return pd.DataFrame(rows)


def drawn_as(effect_of):
    """Stands for drawing: ``effect_of`` says what patching a set of layers brings. Also returns a list of costs."""

    def drawn(model, group, *, sites=None, source=True, **options):
        sites = {"source": Site()} | localize.single_layers(model) if sites is None else sites
        found = {n: [effect_of(set(s.layers)) * (1 + 0.01 * (p.seed % 3)) for p in group] for n, s in sites.items()}
        table = table_of(found)
        table["seed"] = [pair.seed for _ in found for pair in group]
        asked.append(len(table))
        return table

    asked = []
    return drawn, asked


def additive(alone):
    return lambda layers: sum(alone.get(i, 0.0) for i in layers)


def overlapping(layers):
    """Layers 0 and 1 do the same; layer 2 does the rest."""
    return 0.5 * bool({0, 1} & layers) + 0.4 * (2 in layers)


@pytest.mark.parametrize(
    ("effect_of", "wanted"),
    [
        (additive({2: 0.8}), (2,)),
        (additive({4: 0.5, 5: 0.3}), (4, 5)),
        (additive({1: 0.3, 7: 0.3, 9: 0.25}), (1, 7, 9)),
        (additive({3: 0.64, 6: 0.05, 8: 0.09}), (3, 8)),  # together 0.94 of all three
        (overlapping, (0, 2)),
    ],
)
@pytest.mark.parametrize("how", ["exhaustive", "budgeted"])
def test_searches_find_the_fewest_layers_that_suffice(model, monkeypatch, how, effect_of, wanted):
    drawn, asked = drawn_as(effect_of)
    monkeypatch.setattr(localize, "sweep", drawn)
    screen = pd.DataFrame(
        [
            {"seed": s, "layer": i, "effect": effect_of({i}), "depth": "one-step", "row_evaluations": 1.0}
            for s in range(6)
            for i in range(len(model.layers))
        ]
    )
    monkeypatch.setattr(localize, "cheap", lambda *a, **k: screen)
    found = localize.search(model, prompts.make_pairs(30), how=how, budget=1.0)
    assert found.layers in (wanted, (1, 2) if 0 in wanted else wanted)
    assert found.reached.mean >= 0.9 and found.confidence > 0.9
    assert found.share == pytest.approx(sum(models.describe("sd3-mini")["kv_share"][i] for i in found.layers))
    assert found.row_evaluations == sum(asked) + (len(screen) if how == "budgeted" else 0)
    if how == "budgeted":
        assert sum(asked) < 30 * len(model.layers) / 2


def test_a_layer_that_only_erases_comes_before_those_that_do_nothing(model, monkeypatch):
    """Layer 9 alone writes nothing, but takes a part of the source's text; with it layer 8 does all there is to do."""
    drawn, asked = drawn_as(lambda layers: 0.5 * (8 in layers) + 0.3 * ({8, 9} <= layers))

    def sweep(model, group, **options):
        table = drawn(model, group, **options)
        table.loc[table.site == "layer 9", "source_score"] = 0.8
        return table

    monkeypatch.setattr(localize, "sweep", sweep)
    found = localize.search(model, prompts.make_pairs(10), how="exhaustive")
    assert found.layers == (8, 9) and found.effects[9] == 0.0
    assert len(asked) == 2  # the sweep, and both together; each alone is known from the sweep


def test_a_wrong_screen_is_put_right_by_drawing(model, monkeypatch):
    """One-step effects that point elsewhere: leading sets fall short, and more layers are taken in."""
    monkeypatch.setattr(localize, "sweep", drawn_as(additive({7: 0.8}))[0])
    rows = [
        {"seed": s, "layer": i, "effect": float(i == 2), "depth": "one-step", "row_evaluations": 1.0}
        for s in range(6)
        for i in range(12)
    ]
    monkeypatch.setattr(localize, "cheap", lambda *a, **k: pd.DataFrame(rows))
    assert localize.search(model, prompts.make_pairs(20), budget=1.0).layers == (7,)


def test_a_pair_s_effect_starts_at_its_own_floor():
    effects = localize.text_effects(table_of({"layer 0": [0.0, 0.4], "all layers": [0.8, 0.8]}, floor=0.15))
    assert effects.loc[0, "layer 0"] == 0 and effects.loc[1, "all layers"] == pytest.approx(0.8)
    values = localize.reached(effects, "layer 0")
    assert values[0] == pytest.approx(0.25) and values[1:].min() == 0 and values[1:].max() == pytest.approx(0.5)
    with pytest.raises(TextlocError, match="nothing to localize"):
        localize.reached(effects * 0, "layer 0")


def test_a_set_that_was_dropped_early_is_resampled_with_the_others():
    """Both sets do the same where both were drawn: they come out of every resample of the pairs together."""
    rng = np.random.default_rng(0)
    both = rng.random(30)
    effects = pd.DataFrame({"layer 0": both, "layers 0 1": both, "all layers": 1.0})
    whole = localize.reached(effects, "layer 0")
    assert np.array_equal(whole, localize.reached(effects, "layers 0 1"))
    effects.loc[8:, "layer 0"] = np.nan
    part = localize.reached(effects, "layer 0")
    assert part[0] == pytest.approx(both[:8].mean())
    assert np.corrcoef(part[1:], localize.reached(effects, "layers 0 1")[1:])[0, 1] > 0.2
    assert np.std(part[1:]) > np.std(whole[1:])


def test_effects_that_cancel_out_over_the_pairs_are_none(model, monkeypatch):
    """Every layer but one goes up in one pair as much as it goes down in the next."""
    rows = [
        {
            "seed": s,
            "layer": i,
            "effect": 0.3 if i == 3 else 0.2 * (-1) ** s,
            "depth": "one-step",
            "row_evaluations": 1.0,
        }
        for s in range(6)
        for i in range(12)
    ]
    monkeypatch.setattr(localize, "cheap", lambda *a, **k: pd.DataFrame(rows))
    found = localize.search(model, prompts.make_pairs(6), how="one-step")
    assert found.layers == (3,) and found.reached.mean == pytest.approx(1.0)


@pytest.mark.parametrize(("name", "sources"), [("sd3", 10), ("flux", 10), ("ldm", 3)])
def test_a_pair_costs_what_is_budgeted(name, sources):
    tinied = tiny.model(name)
    texts = {"source": 'A sign that says "HELLO"', "target": 'A sign that says "WORLD"'}
    texts |= {"source_text": "HELLO", "target_text": "WORLD", "wall": "", "sign": "", "shape": "", "seed": 1}
    sites = {str(i): Site(layers=(i % 3,)) for i in range(sources - 1)}
    _, rows = localize.patch_pair(tinied, prompts.Pair(**texts), sites, steps=2)
    assert sum(row["row_evaluations"] for row in rows) == pytest.approx(localize._cost(tinied, sources, 2))


def test_models_that_differ_in_other_parts_than_the_denoiser_are_told_apart():
    base, other, third = (models.Model.from_pipeline(tiny.BUILDERS["sd3"]()) for _ in range(3))
    assert localize.fingerprint(base) == localize.fingerprint(other)
    with torch.no_grad():
        next(other.pipe.text_encoder.parameters()).add_(1)
    third.pipe.scheduler = type(third.pipe.scheduler).from_config(third.pipe.scheduler.config, shift=9.0)
    assert len({localize.fingerprint(each) for each in (base, other, third)}) == 3


def test_rank_agreement():
    rng = np.random.default_rng(0)
    a = pd.DataFrame(np.arange(8.0) + 0.1 * rng.standard_normal((20, 8)))
    same = localize.rank_agreement(a, a**3, resamples=200)
    assert same.mean == pytest.approx(1.0) and same.low > 0.9 and same.n == 20
    assert localize.rank_agreement(a, -a, resamples=50).mean == pytest.approx(-1.0)
    assert localize.rank_agreement(a, a * 0, resamples=5).mean == 0.0


def test_a_bad_search_is_refused_before_any_model_runs(model):
    pairs = prompts.make_pairs(2)
    for wrong, said in (({"how": "guess"}, "exhaustive"), ({"share": 1.5}, "not above 1"), ({"budget": 0}, "budget")):
        with pytest.raises(TextlocError, match=said):
            localize.search(model, pairs, **wrong)


def test_small_batches_give_the_same_pictures(model):
    pair = prompts.make_pairs(1)[0]
    sites = localize.joint([(i,) for i in range(4)])
    one, rows = localize.patch_pair(model, pair, sites, steps=2)
    several, more = localize.patch_pair(model, pair, sites, steps=2, batch_size=3)
    np.testing.assert_allclose(one.astype(int), several, atol=1)
    assert [r["site"] for r in more] == [r["site"] for r in rows] == ["source", "target", *sites]
    assert sum(r["row_evaluations"] for r in rows) == 6 * 4
    assert sum(r["row_evaluations"] for r in more) == pytest.approx((6 + 2) * 4)  # the target is drawn three times
    without, rows = localize.patch_pair(model, pair, sites, steps=2, source=False)
    np.testing.assert_allclose(without.astype(int), one[1:], atol=1)
    assert rows[0]["site"] == "target" and "ssim_outside" not in rows[0]


def test_a_published_search_is_taken_for_the_same_pairs_only(model, tmp_path, monkeypatch):
    monkeypatch.setattr(localize, "data_dir", lambda: tmp_path)
    pairs, options = prompts.make_pairs(2), {"steps": 1, "store": Store(tmp_path / "units")}
    found, table = localize.published(model, pairs, "one-step", **options)
    assert not list(tmp_path.glob("results/*.csv"))
    localize.publish(model, pairs, found, **options)
    monkeypatch.setattr(localize, "search", lambda *a, **k: pytest.fail("was done again"))
    again, same = localize.published(model, pairs, "one-step", **options)
    assert again == found and same.equals(table)
    assert list(localize.layer_table(table).mean()) == list(found.effects)
    with pytest.raises(pytest.fail.Exception):
        localize.published(model, prompts.make_pairs(3), "one-step", **options)
    with pytest.raises(pytest.fail.Exception):
        localize.published(model, pairs, "one-step", share=0.5, **options)


# --- killed, and shared out over processes ----------------------------------------------------------------------

COMMAND = [
    "-m",
    "textloc_utils.cli",
    "localize",
    "sd3-mini",
    "--search",
    "exhaustive",
    "--preset",
    "smoke",
    "--pairs",
    "3",
    "--json",
]


def units(folder):
    return sorted(folder.glob("units/sweep/*.jsonl"))


def environment(folder) -> dict:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_THREAD_LIMIT"), "1")
    return {**os.environ, **threads, "TEXTLOC_RESULTS": str(folder), "PYTHONPATH": str(ROOT)}


def answer(text: str) -> dict:
    found = json.loads(text[text.index("{") :])
    assert found.pop("seconds") > 0
    return found


def test_killed_and_started_again_gives_the_same_table_as_two_processes(tmp_path):
    """One run is killed in mid-sweep and taken up again; the other is shared out over two processes."""
    killed, shared = tmp_path / "killed", tmp_path / "shared"
    run = subprocess.Popen([sys.executable, *COMMAND], env=environment(killed), stdout=subprocess.DEVNULL)
    while not units(killed):
        time.sleep(0.05)
        assert run.poll() is None
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    kept = {path: path.stat().st_mtime_ns for path in units(killed)}
    assert 1 <= len(kept) < 3
    again = subprocess.run([sys.executable, *COMMAND], env=environment(killed), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items())  # nothing is done twice
    # accelerate's launcher starts processes as torchrun does.
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", *COMMAND]
    both = subprocess.run(launcher, env=environment(shared), capture_output=True, text=True)
    assert both.returncode == 0, both.stderr
    assert answer(again.stdout) == answer(both.stdout)
    assert [p.name for p in units(killed)] == [p.name for p in units(shared)]
    rows = [[path.read_text().splitlines()[1:-1] for path in units(folder)] for folder in (killed, shared)]
    assert rows[0] == rows[1] and len(rows[0]) == 3
    assert not list(tmp_path.rglob(".part-*"))
