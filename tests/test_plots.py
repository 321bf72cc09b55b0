"""Figures show what their tables hold."""

import base64
import io
import re

import numpy as np
import pandas as pd
from PIL import Image

from textloc_utils.book import plots


def test_effects_mark_the_chosen_layers():
    table = pd.DataFrame(
        {"layer": [0, 1, 2], "mean": [0.0, 0.7, 0.1], "low": [-0.1, 0.6, 0.0], "high": [0.1, 0.8, 0.2]}
    )
    figure = plots.effects_by_model({"m": table}, {"m": (1,)}, label="whole words")
    assert figure.axes[0].get_ylabel() == "whole words"
    bars = figure.axes[0].patches
    assert [bar.get_height() for bar in bars] == [0.0, 0.7, 0.1]
    assert len({bar.get_facecolor() for bar in bars}) == 2 and bars[0].get_facecolor() == bars[2].get_facecolor()


def test_factors_are_rows_and_layers_columns():
    """As ``specificity.alone`` has them, the text first; the patch of all layers is no column."""
    shares = {"text": [0.9, 0.0, 0.2], "material": [0.1, 0.8, 0.3]}
    rows = [
        {"differs": name, "kind": "layer", "layers": f"{layer}", "exact": share}
        for name, of in shares.items()
        for layer, share in enumerate(of)
    ]
    rows += [{"differs": name, "kind": "all", "layers": "0 1 2", "exact": 1.0} for name in shares]
    axis = plots.layers_by_factor({"m": pd.DataFrame(rows), "n": pd.DataFrame(rows)}).axes[1]
    np.testing.assert_allclose(axis.collections[0].get_array().reshape(2, 3), list(shares.values()))
    assert [t.get_text() for t in axis.get_yticklabels()] == ["text", "material"]
    assert [t.get_text() for t in axis.get_xticklabels()] == ["0", "1", "2"]


def test_windows_have_a_line_of_each_kind():
    interval = {"low": [0.0, 0.8], "high": [0.2, 1.0]}
    late = pd.DataFrame({"kind": "from step", "step": [2, 5], "mean": [0.9, 0.1], **interval})
    early = pd.DataFrame({"kind": "until step", "step": [2, 5], "mean": [0.1, 0.9], **interval})
    (legend,) = plots.windows({"m": pd.concat([late, early])}).legends
    assert [t.get_text() for t in legend.get_texts()] == ["from step", "until step"]


def test_emergence_has_a_column_per_evaluation():
    # Before there are letters, no layer is patched alone.
    targets = [None, [0.0, 0.1, 0.2], [0.3, 0.4, 0.5]]
    rows = pd.DataFrame({"samples": [500, 1000, 2000], "target": targets})
    axis = plots.emergence({"m": rows, "n": rows}).axes[1]
    assert [t.get_text() for t in axis.get_xticklabels()] == ["1", "2"]
    np.testing.assert_allclose(axis.collections[0].get_array().reshape(3, 2), [[0.0, 0.3], [0.1, 0.4], [0.2, 0.5]])


def plane_rows(*arms):
    """The table of ``lora_looks.plane`` of the first arms of two."""
    drift = {"gain": [0.1, 0.2], "typefaces": [0.1, 0.6], "materials": [0.2, 0.5], "diversity": [0.0, 0.3]}
    table = pd.DataFrame({"arm": ["localized", "all text layers"]} | drift)
    for name in drift:
        table[f"{name}_low"], table[f"{name}_high"] = table[name] - 0.05, table[name] + 0.05
    return table[table.arm.isin(arms)]


def test_the_plane_has_a_panel_per_drift_and_a_mark_per_arm():
    arms = ("localized", "all text layers")
    # Every arm is named and looks alike everywhere, though the first model lacks one.
    figure = plots.plane({"m": plane_rows(arms[1]), "n": plane_rows(*arms)})
    points = [[tuple(line.lines[0].get_xydata()[0]) for line in axis.containers] for axis in figure.axes]
    assert points == [[(0.6, 0.2)], [(0.5, 0.2)], [(0.1, 0.1), (0.6, 0.2)], [(0.2, 0.1), (0.5, 0.2)]]
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["m", "m", "n", "n"]
    assert [axis.get_xlabel() for axis in figure.axes] == 2 * ["typefaces, bits", "materials"]
    alone, _, both, _ = (axis.containers for axis in figure.axes)
    looks = [(line.lines[0].get_color(), line.lines[0].get_marker()) for line in (*alone, *both)]
    assert looks[0] == looks[2] != looks[1]
    assert {t.get_text() for t in figure.legends[0].get_texts()} == set(arms)


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
    row = {"ssim_outside": 0.9, "ssim_outside_low": 0.8, "ssim_outside_high": 1.0, "toxic": 0.2}
    row |= {"toxic_low": 0.1, "toxic_high": 0.4}
    table = pd.DataFrame([row | {"method": "guard"}, row | {"method": "prompt swap", "toxic": 0.3}])
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
    kinds = {"kind": ["plain", "harmless"], "found": [1.0, 0.02], "low": [1.0, 0.0], "high": [1.0, 0.05]}
    images = np.zeros((9, 64, 128, 3), np.uint8)
    names = ["ldm-mini", "sdxl-mini", "if-mini"]
    figures = [
        plots.windows(dict.fromkeys(names, steps)),
        plots.plane(dict.fromkeys(names, plane_rows("localized", "all text layers"))),
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
