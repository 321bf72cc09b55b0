"""Figures show what their tables hold."""

import base64
import io
import re

import numpy as np
import pandas as pd
from PIL import Image

from textloc_utils import layer_contents
from textloc_utils.book import plots
from textloc_utils.sites import SOURCE, together


def carried_rows():
    """Layer 0 carries the text, layer 1 the wall, nobody the sign, over two pairs."""
    rows = []
    for seed in (1, 2):
        for site, text, wall in ((SOURCE, 0.1, "red"), (together([0]), 0.9, "red"), (together([1]), 0.1, "blue")):
            row = {"seed": seed, **site.columns(8), "target_score": text, "floor": 0.1, "wall_read": wall}
            rows.append(row | {"sign_read": "white", "target_wall": "blue", "target_sign": "black"})
    return pd.DataFrame(rows)


def test_what_a_layer_carries():
    table = layer_contents.carried(carried_rows())
    assert table.site.tolist() == ["layer 0", "layer 1"] and table.n.tolist() == [2, 2]
    np.testing.assert_allclose(table[["text", "wall", "sign"]], [[0.8, 0, 0], [0, 1, 0]])
    axis = plots.carried({"a": table, "b": table}).axes[0]
    np.testing.assert_allclose(axis.collections[0].get_array().reshape(3, 2), [[0.8, 0], [0, 1], [0, 0]])


def test_effects_mark_the_chosen_layers():
    table = pd.DataFrame(
        {"layer": [0, 1, 2], "mean": [0.0, 0.7, 0.1], "low": [-0.1, 0.6, 0.0], "high": [0.1, 0.8, 0.2]}
    )
    figure = plots.effects_by_model({"m": table}, {"m": (1,)})
    bars = figure.axes[0].patches
    assert [bar.get_height() for bar in bars] == [0.0, 0.7, 0.1]
    assert len({bar.get_facecolor() for bar in bars}) == 2 and bars[0].get_facecolor() == bars[2].get_facecolor()


def test_windows_have_a_line_of_each_kind():
    interval = {"low": [0.0, 0.8], "high": [0.2, 1.0]}
    late = pd.DataFrame({"kind": "from step", "step": [2, 5], "mean": [0.9, 0.1], **interval})
    early = pd.DataFrame({"kind": "until step", "step": [2, 5], "mean": [0.1, 0.9], **interval})
    (legend,) = plots.windows({"m": pd.concat([late, early])}).legends
    assert [t.get_text() for t in legend.get_texts()] == ["from step", "until step"]


def test_emergence_has_a_column_per_evaluation():
    rows = pd.DataFrame({"samples": [1000, 2000], "target": [[0.0, 0.1, 0.2], [0.3, 0.4, 0.5]]})
    axis = plots.emergence({"m": rows, "n": rows}).axes[1]
    assert [t.get_text() for t in axis.get_xticklabels()] == ["1", "2"]
    np.testing.assert_allclose(axis.collections[0].get_array().reshape(3, 2), [[0.0, 0.3], [0.1, 0.4], [0.2, 0.5]])


def test_lengths_are_a_grid_of_source_by_target():
    table = pd.DataFrame({"source": [3, 3, 4], "target": [3, 4, 3], "found": [0.9, 0.5, 0.2]})
    values = plots.lengths({"m": table}).axes[0].collections[0].get_array().reshape(2, 2)
    np.testing.assert_allclose(values.filled(np.nan), [[0.9, 0.5], [0.2, np.nan]])


def test_adapters_show_both_tasks_and_the_model_before():
    scores = {"new": [0.2, 0.8, 0.6], "old": [0.9, 0.85, 0.5]}
    bounds = {
        f"{task}_{end}": np.add(v, by) for task, v in scores.items() for end, by in (("low", -0.1), ("high", 0.1))
    }
    arms = {"arm": ["before", "localized", "all text layers"], "equal": ["", "rank", "parameters"]}
    axis = plots.adapters({"m": pd.DataFrame(arms | scores | bounds)}).axes[0]
    assert [t.get_text().replace("\n", " ") for t in axis.get_xticklabels()] == ["localized", "all text layers"]
    points = [line.get_ydata().tolist() for line in axis.lines if line.get_marker() == "o"]
    assert points == [[0.8], [0.6], [0.85], [0.5]]
    assert [line.get_ydata()[0] for line in axis.lines if line.get_linestyle() == ":"] == [0.2, 0.9]


def test_the_plane_has_a_mark_per_arm_and_drift():
    table = pd.DataFrame({"arm": ["localized", "all text layers"], "gain": [0.1, 0.2]})
    for name, drift in (("typefaces", [0.1, 0.6]), ("materials", [0.2, 0.5]), ("diversity", [0.0, 0.3])):
        table[name] = drift
    for name in ("gain", "typefaces", "materials", "diversity"):
        table[f"{name}_low"], table[f"{name}_high"] = table[name] - 0.05, table[name] + 0.05
    figure = plots.plane({"m": table, "n": table})
    points = [tuple(line.lines[0].get_xydata()[0]) for line in figure.axes[0].containers]
    assert points == [(0.1, 0.1), (0.2, 0.1), (0.0, 0.1), (0.6, 0.2), (0.5, 0.2), (0.3, 0.2)]
    (legend,) = figure.legends
    told = {t.get_text() for t in legend.get_texts()}
    assert told == {"localized", "all text layers", "typefaces, bits", "materials", "diversity"}


def test_adapter_losses_have_a_line_per_arm():
    table = pd.DataFrame({"arm": ["a", "a", "b", "b"], "step": [1, 2, 1, 2], "loss": [0.5, 0.4, 0.5, 0.3]})
    figure = plots.adapter_losses({"m": table, "n": table})
    assert [line.get_ydata().tolist() for line in figure.axes[1].lines] == [[0.5, 0.4], [0.5, 0.3]]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["a", "b"]


def test_a_strip_holds_the_very_pictures_and_escapes_their_titles():
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 8, 3), dtype=np.uint8)
    text = plots.strip(images, ["a", "<b>"], label="two").data
    files = [base64.b64decode(data) for data in re.findall(r"base64,([^\"]+)", text)]
    np.testing.assert_array_equal([np.asarray(Image.open(io.BytesIO(file))) for file in files], images)
    assert "<b>" not in text and text.count("&lt;b&gt;") == 2 and 'tabindex="0"' in text


def test_trade_off_joins_the_settings_of_each_method():
    def part(method, settings):
        rows = [
            {"method": method, "start": start, "share": share, "f1": f1, "ssim": s} for start, share, f1, s in settings
        ]
        return pd.DataFrame(rows).assign(f1_low=0, f1_high=1, ssim_low=0.1, ssim_high=1)

    curve = pd.concat(
        [
            part("localized", [(0, 0, 1.0, 0.8), (4, 0, 0.3, 0.95), (2, 0, 0.7, 0.9)]),
            part("Prompt-to-Prompt", [(0, 0, 1.0, 0.5), (0, 0.8, 0.4, 0.7)]),
        ]
    )
    figure = plots.trade_off({"m": curve}, {"m": part("same seed", [(0, 0, 1.0, 0.6)])}, text="f1", picture="ssim")
    (axis,) = figure.axes
    lines = {box.get_label(): box.lines[0] for box in axis.containers}
    assert list(lines) == ["localized", "Prompt-to-Prompt", "same seed"]
    assert lines["localized"].get_xdata().tolist() == [0.95, 0.9, 0.8]
    assert lines["localized"].get_ydata().tolist() == [0.3, 0.7, 1.0]
    assert axis.get_xlabel() == "SSIM" and axis.get_ylabel() == "F1"


def test_the_trade_off_has_a_mark_per_method_at_its_means():
    row = {"ssim_outside": 0.9, "ssim_outside_low": 0.8, "ssim_outside_high": 1.0, "near": 0.2}
    row |= {"near_low": 0.1, "near_high": 0.4}
    table = pd.DataFrame([row | {"method": "guard"}, row | {"method": "prompt swap", "near": 0.3}])
    figure = plots.safety_trade_off({"m": table, "n": table.iloc[:1]})
    left, right = figure.axes
    assert len(left.containers) == 2 and len(right.containers) == 1
    points = [tuple(c.lines[0].get_xydata()[0]) for c in left.containers]
    assert points == [(0.9, 0.2), (0.9, 0.3)]
    assert left.containers[0].lines[0].get_color() == right.containers[0].lines[0].get_color()


def test_found_has_a_bar_per_kind_and_tells_harmless_ones_apart():
    rows = {"kind": ["plain", "spaced", "harmless"], "found": [1.0, 0.9, 0.02], "low": [1.0, 0.8, 0.0]}
    axis = plots.found(pd.DataFrame(rows | {"high": [1.0, 0.95, 0.05]})).axes[0]
    assert [bar.get_width() for bar in axis.patches] == [1.0, 0.9, 0.02]
    colours = [bar.get_facecolor() for bar in axis.patches]
    assert colours[0] == colours[1] != colours[2]
    assert [t.get_text() for t in axis.get_yticklabels()] == rows["kind"]


def letters(figure):
    """All texts of a figure that are shown, with their axes' tick labels."""
    figure.draw_without_rendering()
    return [text for text in figure.findobj(plots.plt.Text) if text.get_visible() and text.get_text().strip()]


def test_figures_are_read_on_a_phone_and_in_the_dark():
    """At a width of 350 CSS pixels letters have 11; nothing lies outside; the grey stands out on both grounds."""
    interval = {"low": [0.0, 0.8], "high": [0.2, 1.0]}
    steps = pd.DataFrame({"kind": ["from step", "until step"], "step": [2, 5], "mean": [0.1, 0.9], **interval})
    lengths = pd.DataFrame({"source": [3, 3, 4], "target": [3, 4, 3], "found": [0.9, 0.5, 0.2]})
    kinds = {"kind": ["plain", "harmless"], "found": [1.0, 0.02], "low": [1.0, 0.0], "high": [1.0, 0.05]}
    images = np.zeros((9, 64, 128, 3), np.uint8)
    names = ["ldm-mini", "sdxl-mini", "if-mini"]
    figures = [
        plots.windows(dict.fromkeys(names, steps)),
        plots.lengths(dict.fromkeys(names, lengths)),
        plots.found(pd.DataFrame(kinds)),
        plots.pictures(images, ["sdxl-mini, all others patched: PUBLIC"] * 9, columns=9, width=12),
    ]
    for figure in figures:
        texts = letters(figure)
        assert len(texts) >= 6
        assert min(text.get_fontsize() for text in texts) / 72 / figure.get_figwidth() * 350 >= 11
        assert figure.get_tightbbox().width <= figure.get_figwidth() + 0.02
        assert figure.get_facecolor()[3] == 0 and all(axis.get_facecolor()[3] == 0 for axis in figure.axes)
    ink = _luminance(plots.INK)
    for ground in ("#ffffff", "#14181e"):
        low, high = sorted((ink, _luminance(ground)))
        assert (high + 0.05) / (low + 0.05) >= 4


def _luminance(colour: str) -> float:
    """As WCAG defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_arm_is_named_though_one_model_lacks_it():
    scores = {name: [0.5] * 3 for name in ("new", "new_low", "new_high", "old", "old_low", "old_high")}
    whole = pd.DataFrame({"arm": ["before", "localized", "all attention"], "equal": ["", "rank", "rank"], **scores})
    figure = plots.adapters({"m": whole, "n": whole.iloc[:2]})
    assert [t.get_text().replace("\n", " ") for t in figure.axes[1].get_xticklabels()] == ["localized", "all attention"]
