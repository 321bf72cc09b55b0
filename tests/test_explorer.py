"""The explorer's files: what ``textloc explore`` writes, and that the committed files are of the shipped models."""

import numpy as np
import pytest
import tiny
from PIL import Image

from textloc_utils import experiment, models, prompts, scene_pairs, settings, sites, sweeps
from textloc_utils.book import explorer
from textloc_utils.experiment import Experiment
from textloc_utils.settings import TextlocError

COMMITTED = sorted(path.stem for path in explorer.store().root.glob("*.csv"))


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A data folder of its own."""
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("TEXTLOC_DATA", str(tmp_path / "data"))
    return tmp_path / "data" / "results" / "explorer"


@pytest.fixture
def page(monkeypatch):
    """The extension that puts the files on a page."""
    monkeypatch.syspath_prepend(str(settings.ROOT / "book" / "_ext"))
    import layer_explorer

    return layer_explorer


def test_publish_writes_pictures_and_their_rows(elsewhere, page, monkeypatch):
    run, pairs = Experiment.of(tiny.model("sd3")), prompts.make_pairs(2)
    table = explorer.publish(run, pairs)
    name, patched = run.name, [site.name for site in sites.single_layers(run.model)]
    assert list(table.site) == 2 * ["source", "target", *patched]
    loaded = explorer.store().load_published(name)
    assert loaded.equals(table) and loaded.attrs["provenance"]["key"]["weights"] == experiment.fingerprint(run.model)
    assert [pair["prompt"] for pair in page.told(name, loaded)["pairs"]] == [pair.source for pair in pairs]
    pictures, _ = sweeps.patch_pair(run, pairs[1])
    sheet = np.asarray(Image.open(explorer.sprite_path(name, pairs[1].seed)).convert("RGB"))
    np.testing.assert_array_equal(sheet.reshape(pictures.shape), pictures)  # without loss, in the table's order

    # Fewer pairs: nothing is drawn again, and no picture is left that no table names.
    monkeypatch.setattr(sweeps, "patch_pair", lambda *a, **k: pytest.fail("drawn again"))
    assert len(explorer.publish(run, pairs[:1])) == len(table) / 2
    files = sorted(path.name for path in elsewhere.iterdir())
    assert files == [f"{name}.csv", f"{name}.json", f"{name}_{pairs[0].seed}.webp"]


def test_no_pair_writes_nothing(elsewhere):
    with pytest.raises(TextlocError, match="at least one pair"):
        explorer.publish(Experiment.of(tiny.model("ldm")), [])
    assert not elsewhere.exists()


def test_the_book_explores_several_models():
    assert len(COMMITTED) >= 3 and set(COMMITTED) <= set(models.MINIATURES)
    assert sum(path.stat().st_size for path in explorer.store().root.iterdir()) < 3 * 2**20


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_pictures_are_of_the_shipped_weights(name):
    table, model = explorer.store().load_published(name), models.load(name, device="cpu")
    pairs = scene_pairs.for_model(model, table.seed.nunique(), "report")
    assert table.groupby("seed").prompt.unique().map(list).to_dict() == {pair.seed: [pair.source] for pair in pairs}
    key = Experiment.of(model).key
    key |= {"rows": sweeps.ROWS, "pairs": experiment.digest_of(pairs)}
    assert table.attrs["provenance"]["key"] == key, f"draw them again: textloc explore {name}"
    height = table.attrs["provenance"]["height"]
    for seed, rows in table.groupby("seed"):
        assert Image.open(explorer.sprite_path(name, seed)).height == height * len(rows)
    # Where a study is published, of the same weights, it says the same of the same pairs.
    study = experiment.published_store().root / f"study_{name}_length.csv"
    if study.exists():
        published = experiment.published_store().load_published(study.stem)
        assert published.attrs["provenance"]["key"]["weights"] == key["weights"]
        at = ["seed", "source_text", "target_text", "site"]
        both = table.merge(published, on=at, suffixes=("", "_study"))
        assert both.groupby("site").size().to_dict() == dict.fromkeys(["source", "target", "all layers"], len(pairs))
        assert (both.read == both.read_study).mean() > 0.97  # another machine may round a letter's edge away
        assert np.abs(both.target_score - both.target_score_study).mean() < 0.02


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_pictures_are_what_is_drawn_now(name):
    run, table = Experiment.of(models.load(name, device="cpu")), explorer.store().load_published(name)
    pair = scene_pairs.for_model(run.model, 1, "report")[0]
    rows = table[table.seed == pair.seed].reset_index(drop=True)
    sheet = np.asarray(Image.open(explorer.sprite_path(name, pair.seed)).convert("RGB")).astype(float)
    stored = sheet.reshape(len(rows), run.model.spec.height, run.model.spec.width, 3)
    drawn, now = sweeps.patch_pair(run, pair, [sites.together([0]), sites.every_layer(run.model)])
    assert [row["kind"] for row in now] == ["source", "target", "layer", "all"]
    for picture, row in zip(drawn, now, strict=True):
        i = rows.index[rows.site == row["site"]][0]
        assert row["read"] == rows.read[i]
        # A batch of another size, or another machine, may round otherwise; another picture is tens of levels away.
        assert np.abs(picture - stored[i]).mean() < 2


def test_a_text_that_ends_a_script_ends_none(page):
    """The data lies in a script element, whose end no quotation mark hides."""
    pair = {"file": "", "source": "</script><script>alert(1)</script>", "target": "<!--", "prompt": "", "rows": []}
    made = [page.markup({"m": {"height": 1, "width": 1, "pairs": pairs}}, "") for pairs in ([], [pair])]
    assert "alert(1)" in made[1] and made[0].count("</script") == made[1].count("</script") >= 1
