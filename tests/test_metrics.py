"""Scores against values worked out by hand."""

import dataclasses
import math
import warnings

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from skimage.metrics import structural_similarity

from textloc_utils import metrics
from textloc_utils.settings import TextlocError

# --- intervals ---


def test_interval_prints_and_is_frozen():
    interval = metrics.Interval(0.91251, 0.87, 0.95, 200)
    assert str(interval) == "0.913 [0.870, 0.950], n = 200"
    with pytest.raises(dataclasses.FrozenInstanceError):
        interval.mean = 1.0


def test_bootstrap_of_one_value_and_of_equal_values():
    assert metrics.bootstrap([0.25]) == metrics.Interval(0.25, 0.25, 0.25, 1)
    assert metrics.bootstrap([True, True, True]) == metrics.Interval(1.0, 1.0, 1.0, 3)


def test_bootstrap_of_two_values_is_the_binomial():
    """Resampled means of (0, 1) are 0, 1/2, 1 with chances 1/4, 1/2, 1/4: the interval is all of it."""
    assert metrics.bootstrap([0, 1]) == metrics.Interval(0.5, 0.0, 1.0, 2)


def test_bootstrap_approaches_the_normal_interval():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    interval = metrics.bootstrap(values)
    half = 1.96 * values.std() / math.sqrt(400)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_bootstrap_covers_the_true_mean_about_95_times_in_100():
    rng = np.random.default_rng(2)
    inside = 0
    for i in range(300):
        low, high = metrics.percentiles(metrics.resampled(rng.random(60) < 0.7, seed=i, resamples=500))
        inside += low <= 0.7 <= high
    assert 0.90 <= inside / 300 <= 0.98


def test_resamples_are_seeded_and_their_batches_are_seamless():
    values = np.random.default_rng(0).random(300_000)  # several batches of resamples
    drawn = metrics.resampled(values, resamples=30)
    np.testing.assert_array_equal(drawn, metrics.resampled(values, resamples=30))
    assert (drawn != metrics.resampled(values, resamples=30, seed=1)).all()
    rows = np.random.default_rng(0).integers(300_000, size=(30, 300_000))
    np.testing.assert_allclose(drawn, values[rows].mean(1), rtol=1e-12)


def test_bootstrap_is_scipy_s_percentile_interval():
    values = np.random.default_rng(3).normal(size=57)
    options = {"n_resamples": 2000, "method": "percentile", "rng": np.random.default_rng(0)}
    theirs = stats.bootstrap((values,), np.mean, **options).confidence_interval
    ours = metrics.bootstrap(values)
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs), rel=1e-12)


def test_rows_are_resampled_whole():
    """Columns that hang together hang together in every sample, and one column alone is resampled as among others."""
    x = np.random.default_rng(4).random(20)
    drawn = metrics.resampled(np.stack([x, 2 * x, 1 - x], axis=1), resamples=50)
    assert drawn.shape == (50, 3) and np.ptp(drawn[:, 0]) > 0
    np.testing.assert_allclose(drawn[:, 1], 2 * drawn[:, 0])
    np.testing.assert_allclose(drawn[:, 2], 1 - drawn[:, 0])
    np.testing.assert_allclose(metrics.resampled(x, resamples=50), drawn[:, 0])
    assert metrics.resampled(x[:1], resamples=3).tolist() == [x[0]] * 3


def test_student_s_interval_is_that_of_the_t_test():
    values = [0.91, 0.95, 0.9]
    theirs = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    ours = metrics.student(values)
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs), rel=1e-12) and ours.n == 3
    assert ours.mean == pytest.approx(np.mean(values)) and metrics.student([1.0, 1.0]).low == 1.0
    assert metrics.student([0.25]) == metrics.Interval(0.25, 0.25, 0.25, 1)


@pytest.mark.parametrize("interval", [metrics.bootstrap, metrics.student])
@pytest.mark.parametrize("values", [[], [1.0, math.nan], [1.0, math.inf], [[1.0, 2.0]]])
def test_bad_values_are_refused(values, interval):
    with pytest.raises(TextlocError):
        interval(values)


def test_rates_have_an_interval_at_their_ends_too():
    none, some = metrics.rate([False] * 100), metrics.rate([True] * 30 + [False] * 70)
    z = 1.959964
    assert (none.mean, none.low, none.n) == (0.0, 0.0, 100) and none.high == pytest.approx(z**2 / (100 + z**2))
    centre, half = (0.3 + z**2 / 200) / (1 + z**2 / 100), z * np.sqrt(0.3 * 0.7 / 100 + z**2 / 40000) / (1 + z**2 / 100)
    assert (some.low, some.high) == pytest.approx((centre - half, centre + half), abs=1e-5)
    assert metrics.rate([True, True]).high == 1.0 and metrics.rate([True, True]).low < 0.5
    with pytest.raises(TextlocError, match="at least one value"):
        metrics.rate([])
    assert metrics.estimate([True, False]) == metrics.rate([True, False])
    assert metrics.estimate([1.0, 0.5]) == metrics.bootstrap([1.0, 0.5])


def test_paired_difference():
    a, b = [0.9, 0.5, 0.7], [0.4, 0.0, 0.2]
    interval = metrics.paired_difference(a, b)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((0.5, 0.5, 0.5))
    assert metrics.paired_difference([True, True], [False, True]).mean == 0.5  # numpy booleans do not subtract
    with pytest.raises(TextlocError, match="3 and 2"):
        metrics.paired_difference(a, b[:2])
    seeds = [0.9, 0.8, 0.85], [0.7, 0.75, 0.72]
    theirs = stats.ttest_rel(*seeds).confidence_interval(0.95)
    few = metrics.paired_difference(*seeds, metrics.student)
    assert (few.low, few.high) == pytest.approx(tuple(theirs), rel=1e-12)


def test_a_summary_has_a_row_per_group_and_its_spans():
    table = pd.DataFrame({"a": ["y", "x", "y"], "b": 1, "hit": [True, True, False], "score": [0.5, 0.25, 1.0]})
    short = metrics.summarise(table, ["a", "b"], ["hit", "score"])
    assert short[["a", "b", "n"]].values.tolist() == [["y", 1, 2], ["x", 1, 1]]
    half = metrics.rate([True, False])
    assert short.loc[0, ["hit", "hit_low", "hit_high"]].tolist() == [half.mean, half.low, half.high]
    assert metrics.spans(short, "score") == ["0.750 [0.500, 1.000]", "0.250 [0.250, 0.250]"]
    plain = pd.DataFrame({"mean": [-0.001], "low": [-0.5], "high": [0.25]})
    assert metrics.spans(plain, form="z.2f") == ["0.00 [-0.50, 0.25]"]


def test_a_summary_of_groups_has_student_s_interval_over_their_means():
    """Three random sets that write more than half, less than half and half of the words: sets count, not pictures."""
    hits = {"a": [True] * 24 + [False] * 16, "b": [True] * 16 + [False] * 24, "c": [True, False] * 20}
    rows = [{"kind": kind, "set": name, "hit": hit} for kind in "xyz" for name, of in hits.items() for hit in of]
    table = pd.DataFrame(rows)
    table.loc[table.kind == "y", "hit"] = True
    table.loc[table.kind == "z", "hit"] = table.set == "a"
    found = metrics.summarise_groups(table, ["kind"], "set", ["hit"])
    assert found[["kind", "n"]].values.tolist() == [["x", 120], ["y", 120], ["z", 120]]
    assert found.hit.tolist() == pytest.approx([0.5, 1.0, 1 / 3])
    three = metrics.student([0.6, 0.4, 0.5])
    assert found.loc[0, ["hit_low", "hit_high"]].tolist() == pytest.approx([three.low, three.high])
    # Far wider than if every picture counted for itself; sets that agree leave no width.
    alone = metrics.rate(table.hit[table.kind == "x"])
    assert found.hit_high[0] - found.hit_low[0] > 2 * (alone.high - alone.low)
    assert found.loc[1, ["hit_low", "hit_high"]].tolist() == [1.0, 1.0]
    # One set of three writes everything: the interval is wider than shares can be, and ends at 0 and 1.
    assert found.loc[2, ["hit_low", "hit_high"]].tolist() == [0.0, 1.0]


# --- text ---


def test_evol_is_love_to_the_multiset_rule_only():
    assert metrics.character_scores("evol", "love") == (1.0, 1.0, 1.0)
    assert not metrics.exact_match("evol", "love")
    assert metrics.levenshtein("evol", "love") == 4
    assert metrics.character_error_rate("evol", "love") == 1.0
    assert metrics.text_score("evol", "love") == 0.0


@pytest.mark.parametrize(
    ("read", "wanted", "scores"),
    [
        ("HELO", "hello", (1.0, 4 / 5, 8 / 9)),  # one L missing
        ("HELLLO", "HELLO", (5 / 6, 1.0, 10 / 11)),  # an L too many counts once
        ("LLLL", "LOVE", (1 / 4, 1 / 4, 1 / 4)),
        ("XYZ", "LOVE", (0.0, 0.0, 0.0)),
        ("", "LOVE", (0.0, 0.0, 0.0)),
        ("LOVE", "", (0.0, 0.0, 0.0)),
        ("", "", (1.0, 1.0, 1.0)),
    ],
)
def test_character_scores(read, wanted, scores):
    assert metrics.character_scores(read, wanted) == pytest.approx(scores)


@pytest.mark.parametrize(
    ("read", "wanted", "distance", "error_rate", "score"),
    [
        ("KITTEN", "SITTING", 3, 3 / 7, 4 / 7),
        ("LOVE", "love", 0, 0.0, 1.0),
        ("", "LOVE", 4, 1.0, 0.0),
        ("LOVELOVELOVE", "LOVE", 8, 2.0, 1 / 3),  # the error rate is not capped
        ("HELLOWORLD", "Hello, world!", 0, 0.0, 1.0),
        ("A1", "A2", 1, 1 / 2, 1 / 2),
        ("AB", "", 2, 2.0, 0.0),
        ("", "", 0, 0.0, 1.0),
    ],
)
def test_edit_distance(read, wanted, distance, error_rate, score):
    assert metrics.levenshtein(read, wanted) == distance
    assert metrics.character_error_rate(read, wanted) == pytest.approx(error_rate)
    assert metrics.text_score(read, wanted) == pytest.approx(score)
    assert metrics.exact_match(read, wanted) is (distance == 0)


# --- pictures ---


def flat(value, dtype=np.uint8, shape=(16, 20, 3)):
    return np.full(shape, value, dtype)


def test_uint8_does_not_wrap():
    """10 - 250 is 16 in uint8, whose square is 0: the published figure, 27.9 dB for unrelated pictures."""
    a, b = flat(10), flat(250)
    assert ((a - b) ** 2).mean() == 0  # the trap
    assert metrics.mse(a, b) == 240.0**2
    assert metrics.psnr(a, b) == pytest.approx(20 * math.log10(255 / 240))
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    # Two independent uniform bytes differ by (256^2 - 1) / 6 in mean square.
    assert metrics.mse(x, y) == pytest.approx((256**2 - 1) / 6, rel=0.03)
    assert metrics.mse(x, y) == metrics.mse(y, x) == metrics.mse(x.astype(np.float32), y)


def test_identical_pictures():
    a = np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    assert metrics.mse(a, a) == 0.0
    assert metrics.psnr(a, a) == math.inf
    assert metrics.psnr(a, a, cap=100) == 100.0
    assert metrics.psnr(flat(0), flat(255), cap=100) == 0.0
    assert metrics.ssim(a, a) == pytest.approx(1.0)


def test_mask_leaves_the_text_box_out():
    a, b = flat(100), flat(100)
    b[4:8, 5:15] = 200  # the text
    b[0, 0] = 103  # one pixel outside, off by 3
    outside = np.ones((16, 20), bool)
    outside[4:8, 5:15] = False
    assert metrics.mse(a, b) == pytest.approx((40 * 100**2 + 9) / 320)
    assert metrics.mse(a, b, outside) == pytest.approx(9 / 280)
    assert metrics.psnr(a, b, outside) == pytest.approx(10 * math.log10(255**2 * 280 / 9))
    assert metrics.mse(a, b, ~outside) == 100**2


def test_stack_of_pictures_gives_one_value_each():
    a = np.stack([flat(10), flat(10), flat(10)])
    b = np.stack([flat(10), flat(12), flat(13)])
    mask = np.ones((16, 20), bool)
    np.testing.assert_array_equal(metrics.mse(a, b), [0, 4, 9])
    np.testing.assert_array_equal(metrics.mse(a, b, np.stack([mask] * 3)), [0, 4, 9])
    np.testing.assert_allclose(
        metrics.psnr(a, b, mask, cap=90), [90, 10 * math.log10(255**2 / 4), 10 * math.log10(255**2 / 9)]
    )
    np.testing.assert_allclose(metrics.ssim(a, b, mask), [metrics.ssim(x, y) for x, y in zip(a, b, strict=True)])


def test_ssim_of_flat_pictures_is_the_luminance_term():
    """No variance: SSIM = (2 ab + C1) / (a^2 + b^2 + C1), C1 = (0.01 * 255)^2."""
    c1 = (0.01 * 255) ** 2
    expected = (2 * 50 * 200 + c1) / (50**2 + 200**2 + c1)
    assert metrics.ssim(flat(50), flat(200)) == pytest.approx(expected)


def test_ssim_agrees_with_skimage_and_ignores_what_is_masked_out():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)
    b = np.clip(a.astype(int) + rng.integers(-40, 41, a.shape), 0, 255).astype(np.uint8)
    whole = structural_similarity(a, b, channel_axis=-1, data_range=255)
    assert metrics.ssim(a, b) == pytest.approx(whole)
    assert metrics.ssim(a, b, np.ones((32, 40), bool)) == pytest.approx(whole)
    outside = np.ones((32, 40), bool)
    outside[10:16, 12:30] = False
    c = b.copy()
    c[~outside] = 0
    assert metrics.ssim(a, c) != pytest.approx(whole)
    assert metrics.ssim(a, c, outside) == pytest.approx(metrics.ssim(a, b, outside), rel=1e-12)


@pytest.mark.parametrize("measure", [metrics.mse, metrics.psnr, metrics.ssim])
def test_bad_pictures_and_masks(measure):
    a = flat(1)
    for other in (flat(1, shape=(16, 21, 3)), flat(1, shape=(2, 16, 20, 3))):
        with pytest.raises(TextlocError, match="shape"):
            measure(a, other)
    with pytest.raises(TextlocError, match="shape"):
        measure(a[:, :, 0], a[:, :, 0])
    for mask in (np.ones((16, 20)), np.ones((20, 16), bool)):
        with pytest.raises(TextlocError, match="boolean"):
            measure(a, a, mask)
    with pytest.raises(TextlocError, match="no pixel"):
        measure(a, a, np.zeros((16, 20), bool))


def test_ssim_needs_room_for_a_window():
    with pytest.raises(TextlocError, match="7x7"):
        metrics.ssim(flat(1, shape=(6, 20, 3)), flat(1, shape=(6, 20, 3)))


# --- what planted faults showed ---


def test_rows_drawn_again_are_compared_with_the_stored_ones_of_the_same_place():
    stored = pd.DataFrame(
        {"seed": [1, 2, 3], "site": "a", "read": ["X", "Y", "Z"], "score": [0.5, 1.0, 0.0], "more": 1}
    )
    new = pd.DataFrame({"seed": [3, 1], "site": "a", "read": ["Z", "W"], "score": [0.5, 0.25], "more": 2})
    assert metrics.redrawn(new, stored, ["seed", "site"], "score") == (0.5, 0.375)
    with pytest.raises(TextlocError):
        metrics.redrawn(new.assign(site="b"), stored, ["seed", "site"], "score")
    with pytest.raises(TextlocError):
        metrics.redrawn(new.assign(seed=[3, 4]), stored, ["seed", "site"], "score")


def test_two_values_have_a_student_s_interval():
    interval = metrics.student([0.0, 2.0])
    assert interval.mean == 1.0 and interval.high - 1 == pytest.approx(12.7062, abs=1e-4) and interval.n == 2
    with pytest.raises(TextlocError, match="^Student's interval needs"):
        metrics.student([])


def test_hits_count_once_each():
    assert metrics.rate([2, 0, 3, 0]) == metrics.rate([True, False, True, False])


def test_letters_that_have_no_capital_of_their_own():
    assert metrics.exact_match("STRASSE", "straße") and metrics.levenshtein("ﬁn", "FIN") == 0


def test_scores_of_a_picture_are_plain_numbers():
    a, b = flat(10), flat(20)
    assert all(type(score(a, b)) is float for score in (metrics.mse, metrics.psnr, metrics.ssim))


def test_identical_pictures_give_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metrics.psnr(flat(10), flat(10)) == math.inf


def test_ssim_takes_pictures_from_seven_pixels_on():
    small = flat(10, shape=(7, 7, 3))
    assert metrics.ssim(small, small) == pytest.approx(1.0)
    for shape in ((6, 20, 3), (20, 6, 3)):
        with pytest.raises(TextlocError, match="7x7"):
            metrics.ssim(flat(1, shape=shape), flat(1, shape=shape))
