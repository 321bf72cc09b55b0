"""The searches and their rule, on tables whose answer is known; a search that is killed, and one shared out."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny

import textloc_utils as tl
from textloc_utils import experiment, localization, models, prompts, scene_pairs, sweeps
from textloc_utils.experiment import Experiment
from textloc_utils.results import Store
from textloc_utils.settings import ROOT, TextlocError
from textloc_utils.sites import SOURCE, Site, single_layers, together


@pytest.fixture(scope="module")
def model():
    return models.load("sd3-mini", device="cpu")


def pairs_of(model, n):
    """Pairs of the miniature's world that select a set."""
    return scene_pairs.for_model(model, n, "select")


# --- the selection rule, on tables whose answer is known ---------------------------------------------------------


def table_of(effects: dict[Site, list[float]], floor=0.1):
    """A sweep's table of pairs 0, 1, ... with these text effects, gained at the source's expense."""
    rows = [
        {
            "seed": seed,
            **site.columns(8),
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

    def drawn(experiment, group, chosen=None, *, source=True):
        chosen = [SOURCE, *single_layers(experiment.model)] if chosen is None else chosen
        found = {s: [effect_of(set(s.layers)) * (1 + 0.01 * (p.seed % 3)) for p in group] for s in chosen}
        table = table_of(found)
        table["seed"] = [pair.seed for _ in found for pair in group]
        asked.append(len(table))
        return table

    asked = []
    return drawn, asked


def screened(layers: dict[int, float], n: int):
    """A table of ``sweeps.cheap`` in which these layers have these effects in every pair, and the others none."""
    about = {"depth": "one-step", "row_evaluations": 1.0}
    return pd.DataFrame(
        [{"seed": s, "layer": i, "effect": layers.get(i, 0.0), **about} for s in range(n) for i in range(12)]
    )


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
    monkeypatch.setattr(sweeps, "table", drawn)
    screen = screened({i: effect_of({i}) for i in range(len(model.layers))}, 6)
    monkeypatch.setattr(sweeps, "cheap", lambda *a, **k: screen)
    found = tl.localize(model, pairs_of(model, 30), how=how, budget=1.0)
    assert found.layers in (wanted, (1, 2) if 0 in wanted else wanted)
    assert found.reached.mean >= 0.9 and found.confidence > 0.9
    assert found.share == pytest.approx(sum(models.describe("sd3-mini")["kv_share"][i] for i in found.layers))
    assert found.row_evaluations == sum(asked) + (len(screen) if how == "budgeted" else 0)
    assert (found.sure is None) == (how == "exhaustive")
    if how == "budgeted":
        assert sum(asked) < 0.6 * 30 * (len(model.layers) + 2)  # of the sweep


def test_a_layer_that_only_erases_comes_before_those_that_do_nothing(model, monkeypatch):
    """Layer 9 alone writes nothing, but takes a part of the source's text; with it layer 8 does all there is to do."""
    drawn, asked = drawn_as(lambda layers: 0.5 * (8 in layers) + 0.3 * ({8, 9} <= layers))

    def sweep(*arguments, **options):
        table = drawn(*arguments, **options)
        table.loc[(table.kind == "layer") & (table.layers == "9"), "source_score"] = 0.8
        return table

    monkeypatch.setattr(sweeps, "table", sweep)
    found = tl.localize(model, pairs_of(model, 10), how="exhaustive")
    assert found.layers == (8, 9) and found.effects[9] == 0.0
    assert len(asked) == 2  # the sweep, and both together; each alone is known from the sweep


def test_a_wrong_screen_is_put_right_by_drawing(model, monkeypatch):
    """One-step effects that point elsewhere: leading sets fall short, and more layers are taken in."""
    monkeypatch.setattr(sweeps, "table", drawn_as(additive({7: 0.8}))[0])
    monkeypatch.setattr(sweeps, "cheap", lambda *a, **k: screened({2: 1.0}, 6))
    assert tl.localize(model, pairs_of(model, 20), budget=1.0).layers == (7,)


@pytest.mark.parametrize("truth", [0.9, 0.72])
def test_a_race_is_rarely_wrong_however_often_it_looks(model, monkeypatch, truth):
    """Layer 3 writes the share of all layers' texts that decides, or surely less: few races are sure of the wrong."""
    wrong = sure = 0
    pairs = pairs_of(model, 80)
    for seed in range(60):
        rng = np.random.default_rng(seed)
        luck = {pair.seed: rng.random() for pair in pairs}

        def drawn(experiment, group, chosen, *, source=True, luck=luck):
            rows = {s: [1.0 if s.kind == "all" else float(luck[p.seed] < truth - 1e-9) for p in group] for s in chosen}
            table = table_of(rows)
            table["seed"] = [pair.seed for _ in rows for pair in group]
            return table.assign(exact=(table.target_score - table.floor).round().astype(bool))

        monkeypatch.setattr(sweeps, "table", drawn)
        race = localization._Drawn(Experiment.of(model), "exact")
        best, n, decided = localization._race(race, [(3,)], pairs, 0.9, np.inf, 0, localization.ERROR)
        assert n <= 80 and decided <= (n >= 8)
        sure += decided
        wrong += decided and best is not None
    assert wrong <= 3 and (truth == 0.9 or sure > 45)


def test_a_few_pairs_that_agree_are_not_sure():
    alike = pd.DataFrame({"3": [1.0] * 8, "all": [1.0] * 8})
    low, high = localization._surplus(alike, [3], 0.9, 0.01)
    assert low < 0 < high
    low, _ = localization._surplus(pd.concat([alike] * 12, ignore_index=True), [3], 0.9, 0.01)
    assert low > 0
    assert localization._surplus(alike.assign(**{"3": 0.0}), [3], 0.9, 0.01)[1] < 0


def test_all_races_of_a_search_share_one_error(model, monkeypatch):
    """The screen leads astray, so that there are several races: together they may be wrong as often as one search."""
    monkeypatch.setattr(sweeps, "table", drawn_as(additive({3: 0.5, 4: 0.3}))[0])
    monkeypatch.setattr(sweeps, "cheap", lambda *a, **k: screened({2: 1.0}, 6))
    errors, race = [], localization._race
    monkeypatch.setattr(localization, "_race", lambda *given: errors.append(given[-1]) or race(*given))
    assert tl.localize(model, pairs_of(model, 20), budget=1.0).layers == (3, 4)
    assert len(errors) >= 4 and sum(errors) <= localization.ERROR
    assert errors == [localization.ERROR / 2 ** (i + 1) for i in range(len(errors))]


def test_the_error_of_a_race_is_that_of_all_its_sets_and_looks(model, monkeypatch):
    monkeypatch.setattr(sweeps, "table", drawn_as(additive({3: 0.5, 4: 0.3}))[0])
    errors, surplus = set(), localization._surplus
    monkeypatch.setattr(localization, "_surplus", lambda *given: errors.add(given[-1]) or surplus(*given))
    race = localization._Drawn(Experiment.of(model), "score")
    sets, pairs = [(3,), (3, 4)], pairs_of(model, 100)
    assert localization._race(race, sets, pairs, 0.9, np.inf, 0, 0.04)[0] == (3, 4)
    assert errors == {0.04 / (len(sets) * 8)}  # eight looks from 8 pairs to 100


def test_looks_are_counted():
    assert localization._looks(8, 8) == 1 and localization._looks(8, 100) == 8  # 8 12 18 27 41 62 93 100


def test_the_share_that_an_exact_set_reaches_is_never_without_an_interval(model):
    rows = table_of({together([3]): [1.0] * 20, Site(kind="all"): [1.0] * 20})
    drawn = localization._Drawn(Experiment.of(model), "exact", rows.assign(exact=True))
    found = localization._found("exhaustive", (3,), np.ones(12), drawn, 0.9, 20, 0.0)
    assert found.reached.mean == found.reached.high == 1.0 and 0.8 < found.reached.low < 0.95


def test_a_pair_s_effect_starts_at_its_own_floor():
    effects = sweeps.set_effects(table_of({together([0]): [0.0, 0.4], Site(kind="all"): [0.8, 0.8]}, floor=0.15))
    assert effects.loc[0, "0"] == 0 and effects.loc[1, "all"] == pytest.approx(0.8)
    values = localization.reached(effects, [0])
    assert values[0] == pytest.approx(0.25) and values[1:].min() == 0 and values[1:].max() == pytest.approx(0.5)
    with pytest.raises(TextlocError, match="nothing to localize"):
        localization.reached(effects * 0, [0])


def test_a_set_that_was_dropped_early_is_resampled_with_the_others():
    """Both sets do the same where both were drawn: they come out of every resample of the pairs together."""
    rng = np.random.default_rng(0)
    both = rng.random(30)
    effects = pd.DataFrame({"0": both, "0 1": both, "all": 1.0})
    whole = localization.reached(effects, [0])
    assert np.array_equal(whole, localization.reached(effects, [0, 1]))
    effects.loc[8:, "0"] = np.nan
    part = localization.reached(effects, [0])
    assert part[0] == pytest.approx(both[:8].mean())
    assert np.corrcoef(part[1:], localization.reached(effects, [0, 1])[1:])[0, 1] > 0.2
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
    monkeypatch.setattr(sweeps, "cheap", lambda *a, **k: pd.DataFrame(rows))
    found = tl.localize(model, pairs_of(model, 6), how="one-step")
    assert found.layers == (3,) and found.reached.mean == pytest.approx(1.0)


@pytest.mark.parametrize(("name", "sources"), [("sd3", 10), ("flux", 10), ("ldm", 3)])
def test_a_pair_costs_what_is_budgeted(name, sources):
    tinied = tiny.model(name)
    pair = prompts.Pair.of('A sign that says "HELLO"', "WORLD", seed=1)
    experiment = Experiment.of(tinied, steps=2)
    _, rows = sweeps.patch_pair(experiment, pair, [together([i % 3]) for i in range(sources - 1)])
    cost = localization._cost(experiment, sources)
    assert sum(row["row_evaluations"] for row in rows) == pytest.approx(cost)
    unguided = localization._cost(Experiment.of(experiment, guidance=1.0), sources)
    assert cost == experiment.model.evaluations(experiment.guidance) * unguided


def test_layers_are_among_the_strongest_where_as_many_are_taken():
    found = SimpleNamespace(effects=(0.1, 0.5, -0.9, 0.4, 0.4))  # in order: layers 1, 3, 4, 0, 2
    counted = {layers: localization.among_strongest(found, layers) for layers in ((), (2,), (1, 4), (4, 3), (1, 3, 4))}
    assert list(counted.values()) == [0, 0, 1, 1, 3]


def test_a_bad_search_is_refused_before_any_model_runs(model):
    pairs = pairs_of(model, 2)
    for wrong, said in (
        ({"how": "guess"}, "exhaustive"),
        ({"share": 1.5}, "at most 1, got 1.5"),
        ({"budget": 0}, "budget"),
    ):
        with pytest.raises(TextlocError, match=said):
            tl.localize(model, pairs, **wrong)


def test_a_published_search_is_taken_for_the_same_pairs_only(model, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "data_dir", lambda: tmp_path)
    pairs, run = pairs_of(model, 2), Experiment.of(model, steps=1, store=Store(tmp_path / "units"))
    found, table = localization.published(run, pairs, "one-step")
    assert not list(tmp_path.glob("results/*.csv"))
    found = tl.localize(run, pairs, how="one-step", publish=True)
    monkeypatch.setattr(localization, "localize", lambda *a, **k: pytest.fail("was done again"))
    again, same = localization.published(run, pairs, "one-step")
    assert again == found and same.equals(table)
    assert list(sweeps.layer_table(table).mean()) == list(found.effects)
    for other in (pairs_of(model, 3), {"share": 0.5}, {"guidance": 1.5}):
        changed = other if isinstance(other, dict) else {}
        with pytest.raises(pytest.fail.Exception):
            guided = Experiment.of(run, guidance=changed.pop("guidance", None))
            localization.published(guided, pairs if isinstance(other, dict) else other, "one-step", **changed)


def test_the_published_set_of_an_exhaustive_search_is_drawn_beside_the_source(model, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "data_dir", lambda: tmp_path)
    run = Experiment.of(model, store=Store(tmp_path / "units"), publish=True)
    found, table = localization.published(run, pairs_of(model, 1), "exhaustive")
    kinds = ["source", "target", *["layer"] * 12, "all", "pooled", "all + pooled"]
    assert table.kind.tolist() == kinds + ["set"] * (len(found.layers) > 1) and table.ssim_outside.notna().all()
    assert table.layers.iloc[-1] in (" ".join(map(str, found.layers)), " ".join(map(str, range(12))))
    assert experiment.known_layers(model) == found.layers


def test_what_is_found_prints_short_and_is_shown(model):
    found = tl.localize(model, pairs_of(model, 2), how="one-step", steps=2)
    lines = repr(found).splitlines()
    assert lines[0].startswith(f"sd3-mini: layers {' '.join(map(str, found.layers))} of 12, ") and len(lines) == 3
    bars = found.show().axes[0].patches
    assert [bar.get_height() for bar in bars] == list(found.effects)
    assert len({bars[layer].get_facecolor() for layer in found.layers}) == 1


def test_pairs_of_one_seed_are_refused(model):
    pair = pairs_of(model, 1)[0]
    with pytest.raises(TextlocError, match="same seed"):
        tl.localize(model, [pair, pair])


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
    # The sweep of each pair, and each pair with the chosen set where that has several layers.
    assert rows[0] == rows[1] and len(rows[0]) in (3, 6)
    assert not list(tmp_path.rglob(".part-*"))
