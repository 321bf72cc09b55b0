"""The explorer's files: what ``textloc explore`` writes, and that the committed files are of the shipped models."""

import numpy as np
import pytest
import tiny
from PIL import Image

from textloc_utils import explorer, localize, models, prompts
from textloc_utils.settings import TextlocError, data_dir

COMMITTED = sorted(path.stem for path in explorer.store().root.glob("*.csv"))


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A data folder of its own, with the words."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "words").symlink_to(data_dir() / "words")
    monkeypatch.setenv("TEXTLOC_DATA", str(tmp_path / "data"))
    return tmp_path / "data" / "results" / "explorer"


def test_publish_writes_pictures_and_their_rows(elsewhere, monkeypatch):
    model, pairs = tiny.model("sd3"), prompts.make_pairs(2)
    table = explorer.publish(model, pairs)
    name, sites = model.spec.name, list(localize.single_layers(model))
    assert list(table.site) == 2 * ["source", "target", *sites]
    loaded = explorer.store().load_published(name)
    assert loaded.equals(table) and loaded.attrs["provenance"]["key"]["weights"] == localize.fingerprint(model)
    pictures, _ = localize.patch_pair(model, pairs[1], localize.single_layers(model))
    sheet = np.asarray(Image.open(explorer.sprite_path(name, pairs[1].seed)).convert("RGB"))
    np.testing.assert_array_equal(sheet.reshape(pictures.shape), pictures)  # without loss, in the table's order

    # Fewer pairs: nothing is drawn again, and no picture is left that no table names.
    monkeypatch.setattr(localize, "patch_pair", lambda *a, **k: pytest.fail("drawn again"))
    assert len(explorer.publish(model, pairs[:1])) == len(table) / 2
    files = sorted(path.name for path in elsewhere.iterdir())
    assert files == [f"{name}.csv", f"{name}.json", f"{name}_{pairs[0].seed}.webp"]


def test_no_pair_writes_nothing(elsewhere):
    with pytest.raises(TextlocError, match="at least one pair"):
        explorer.publish(tiny.model("ldm"), [])
    assert not elsewhere.exists()


def test_the_book_explores_several_models():
    assert len(COMMITTED) >= 3 and set(COMMITTED) <= set(models.MINIATURES)
    assert sum(path.stat().st_size for path in explorer.store().root.iterdir()) < 3 * 2**20


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_pictures_are_of_the_shipped_weights(name):
    table = explorer.store().load_published(name)
    pairs = prompts.make_pairs(table.seed.nunique())
    key = localize.published_key(models.load(name, device="cpu"), pairs, None)
    assert table.attrs["provenance"]["key"] == key, f"draw them again: textloc explore {name}"
    height = table.attrs["provenance"]["height"]
    for seed, rows in table.groupby("seed"):
        assert Image.open(explorer.sprite_path(name, seed)).height == height * len(rows)
    # Where a sweep is published, of the same weights, it says the same of the same pairs.
    sweep = localize.published_store().root / f"localize_{name}_exhaustive.csv"
    if sweep.exists():
        published = localize.published_store().load_published(sweep.stem)
        assert published.attrs["provenance"]["key"]["weights"] == key["weights"]
        both = table.merge(published, on=["seed", "site"], suffixes=("", "_sweep"))
        assert len(both) == len(table)
        assert (both.read == both.read_sweep).mean() > 0.97  # another machine may round a letter's edge away
        assert np.abs(both.target_score - both.target_score_sweep).mean() < 0.02


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_pictures_are_what_is_drawn_now(name):
    model, table = models.load(name, device="cpu"), explorer.store().load_published(name)
    pair = prompts.make_pairs(1)[0]
    rows = table[table.seed == pair.seed].reset_index(drop=True)
    sheet = np.asarray(Image.open(explorer.sprite_path(name, pair.seed)).convert("RGB")).astype(float)
    stored = sheet.reshape(len(rows), model.spec.height, model.spec.width, 3)
    chosen = ["layer 0", "all layers"]
    drawn, now = localize.patch_pair(model, pair, {s: localize.single_layers(model)[s] for s in chosen})
    assert [row["site"] for row in now] == ["source", "target", *chosen]
    for picture, row in zip(drawn, now, strict=True):
        i = rows.index[rows.site == row["site"]][0]
        assert row["read"] == rows.read[i]
        # A batch of another size, or another machine, may round otherwise; another picture is tens of levels away.
        assert np.abs(picture - stored[i]).mean() < 2
