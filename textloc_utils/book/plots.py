"""Figures from pictures and tidy tables: each function returns a matplotlib Figure, and ``strip`` returns HTML.

All figures can be read on a phone and in dark mode. They are only so wide that their letters are large enough on a
phone, and panels are stacked. Figures have a transparent background. Letters and lines are in a grey that is visible on
white and on black.
"""

import base64
import html
import io
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import HTML
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from PIL import Image

MEAN = ("mean", "low", "high")
SOURCE, TARGET, QUIET = "#4878a8", "#c8553d", "#9a9a9a"
#: From transparent, which shows the page, to a colour.
HEAT = LinearSegmentedColormap.from_list("heat", [to_rgba(TARGET, 0), to_rgba(TARGET, 1)])
#: Width in inches, and size of letters in points. A phone shows a figure 350 CSS pixels wide. Letters of 10 points are
#: then 11 pixels high.
WIDTH, POINTS = 4.4, 10
#: Colour of letters and lines. Its contrast is more than 4 on a white page and on a dark page.
INK = "#797979"
STYLE = {
    "figure.facecolor": "none",
    "figure.dpi": 200,
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    **dict.fromkeys(("font.size", "axes.titlesize", "legend.fontsize"), POINTS),
    **dict.fromkeys(("axes.labelsize", "xtick.labelsize", "ytick.labelsize"), POINTS),
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
}


def _figure(height: float, **options) -> Figure:
    """Make a figure with pyplot, so that notebooks can show it, and close it, so that they show it only once."""
    plt.rcParams.update(STYLE)  # also for everything that is drawn into it later
    figure = plt.figure(layout="constrained", figsize=(WIDTH, height), **options)
    plt.close(figure)
    return figure


def _panels(names: Iterable[str], height: float, *, columns: int = 1, **options):
    """Make a figure with one axis per name, which is its title. ``height`` is that of each row of axes, in inches."""
    names = list(names)
    columns = min(columns, len(names))
    rows = -(-len(names) // columns)
    figure = _figure(rows * height + 0.3)
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel()
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    for axis, name in zip(axes, names, strict=False):
        axis.set_title(name, loc="left")
    sns.despine(figure)
    return figure, axes[: len(names)]


def _legend(figure: Figure, axes: Iterable) -> None:
    """Add one legend below all axes, with the labels of the axis that has most, in two columns if they fit."""
    marks, labels = max((axis.get_legend_handles_labels() for axis in axes), key=lambda each: len(each[1]))
    figure.legend(marks, labels, loc="outside lower center", ncols=1 if max(map(len, labels)) > 22 else 2)


def _heat(axis: Axes, values: pd.DataFrame | np.ndarray, label: str, **options) -> None:
    """Draw a heat map of shares with a frame and a colour bar, which has the name ``label``."""
    sns.heatmap(values, ax=axis, vmin=0, vmax=1, cmap=HEAT, cbar_kws={"label": label}, **options)
    axis.tick_params(axis="both", rotation=0)
    for spine in axis.spines.values():
        spine.set_visible(True)


def _error(table: pd.DataFrame, score: str = "") -> np.ndarray:
    """Lengths of the interval below and above a score, or below and above the column mean: (2, rows)."""
    mean, low, high = (table[name] for name in ((score, f"{score}_low", f"{score}_high") if score else MEAN))
    return np.abs(np.stack([mean - low, high - mean]))


def pictures(
    images: Sequence[np.ndarray] | np.ndarray, titles: Sequence[str], *, columns: int = 4, width: float = WIDTH
) -> Figure:
    """A grid of uint8 pictures (H, W, 3), each with a title. Pixels are not smoothed.

    If there are more than four columns, fewer are used, if possible a divisor of their number. ``width`` is in inches,
    at most WIDTH.
    """
    columns = max((n for n in range(2, 5) if columns % n == 0), default=4) if columns > 4 else columns
    rows = -(-len(images) // columns)
    height, across = images[0].shape[:2]
    cell = min(width, WIDTH) / columns
    letters = int(cell * 72 / (0.62 * POINTS))  # letters per line
    titles = [textwrap.fill(title, letters) for title in titles]
    lines = max(title.count("\n") + 1 for title in titles)
    figure = _figure(rows * (cell * height / across + lines * POINTS * 1.25 / 72 + 0.06))
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, image, title in zip(axes, images, titles, strict=False):
        axis.imshow(image, interpolation="nearest")
        axis.set_title(title, pad=3)
    return figure


def strip(images: Sequence[np.ndarray], titles: Sequence[str], *, label: str) -> HTML:
    """Pictures in one row that scrolls with the mouse or the keyboard. Each title is below its picture.

    ``images`` are uint8 (H, W, 3). They are shown 160 CSS pixels wide without smoothing. ``label`` is the name of the
    row for screen readers.
    """
    cells = []
    for image, title in zip(images, titles, strict=True):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG", optimize=True)
        data, text = base64.b64encode(file.getvalue()).decode(), html.escape(title)
        told = html.escape(f"{label}: {title}")
        cells.append(
            f'<figure style="margin:0;flex:none;width:160px">'
            f'<img alt="{told}" src="data:image/png;base64,{data}" style="width:100%;image-rendering:pixelated">'
            f'<figcaption style="font-size:.8em;text-align:center">{text}</figcaption></figure>'
        )
    box = "display:flex;gap:8px;overflow-x:auto;padding-bottom:8px"
    return HTML(
        f'<div role="group" aria-label="{html.escape(label)}" tabindex="0" style="{box}">{"".join(cells)}</div>'
    )


def layer_scores(summary: pd.DataFrame) -> Figure:
    """Target and source letters per patched site, with 95 % intervals (a table of ``sweeps.summarise``)."""
    figure, (axis,) = _panels([""], 0.2 * len(summary) + 0.7)
    place = np.arange(len(summary))[::-1]
    for score, label, colour, shift in (
        ("target_score", "target text", TARGET, 0.12),
        ("source_score", "source text", SOURCE, -0.12),
    ):
        style = {"fmt": "o", "color": colour, "capsize": 2, "markersize": 4}
        axis.errorbar(summary[score], place + shift, xerr=_error(summary, score), label=label, **style)
    axis.set_yticks(place, summary.layers.where(summary.kind == "layer", summary.site))
    axis.set(ylabel="patched text layer", xlabel="text score", xlim=(-0.03, 1.03), ylim=(-0.6, len(place) - 0.4))
    _legend(figure, [axis])
    return figure


def effects_by_model(
    tables: Mapping[str, pd.DataFrame], chosen: Mapping[str, Sequence[int]], *, label: str = "text effect"
) -> Figure:
    """Effect of each layer alone, one row per model, with 95 % intervals. The chosen layers are marked.

    ``tables`` maps a model's name to a table with columns layer, mean, low and high. ``label`` is the effect's name.
    """
    figure, axes = _panels(tables, 1.6)
    for axis, (name, table) in zip(axes, tables.items(), strict=True):
        colours = [TARGET if layer in chosen[name] else SOURCE for layer in table.layer]
        axis.bar(table.layer, table["mean"], color=colours, width=0.8)
        axis.errorbar(table.layer, table["mean"], _error(table), fmt="none", ecolor=QUIET, elinewidth=1)
        axis.set(ylabel=label, ylim=(min(-0.05, table.low.min()), 1.0))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].set_xlabel("patched text layer, in execution order")
    return figure


def layers_by_factor(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """How often each layer alone changes the text and each factor, one heat map per model (``specificity.alone``)."""
    figure, axes = _panels(tables, 1.8)
    for axis, table in zip(axes, tables.values(), strict=True):
        layers = table[table.kind == "layer"].astype({"layers": int})
        shares = layers.pivot(index="differs", columns="layers", values="exact")
        _heat(axis, shares.loc[list(dict.fromkeys(table.differs))], "share\nbrought")
        axis.set(xlabel="", ylabel="")
    axes[-1].set_xlabel("patched text layer")
    return figure


def windows(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Text effect of patches that start late, and of patches that stop early, one panel per model.

    ``tables`` maps a model's name to a table with columns kind ("from step", "until step"), step, mean, low and high.
    """
    figure, axes = _panels(tables, 2.2, columns=2, sharey=True)
    for axis, table in zip(axes, tables.values(), strict=True):
        for (kind, part), colour in zip(table.groupby("kind", sort=False), (TARGET, SOURCE), strict=False):
            style = {"fmt": "o-", "color": colour, "capsize": 2, "markersize": 4}
            axis.errorbar(part.step, part["mean"], _error(part), label=kind, **style)
        axis.set_xlabel("step")
    for axis in axes[::2]:
        axis.set(ylabel="text effect", ylim=(-0.05, 1.05))
    _legend(figure, axes)
    return figure


def plane(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Gain in spelling against drift, two panels per model, with 95 % intervals (tables of ``lora_looks.plane``).

    The left panel shows the change of the entropy of typefaces. The right panel shows the change of the shares of
    materials. Points further left have less drift.
    """
    drifts = {"typefaces": "typefaces, bits", "materials": "materials"}
    figure, axes = _panels([f"{name}" for name in tables for _ in drifts], 2.2, columns=2, sharey="row")
    arms = list(dict.fromkeys(arm for table in tables.values() for arm in table.arm))
    looks = dict(zip(arms, zip(sns.color_palette("colorblind", len(arms)), "osD^", strict=False), strict=True))
    for at, table in enumerate(tables.values()):
        for axis, (name, label) in zip(axes[2 * at :], drifts.items(), strict=False):
            for arm, row in table.groupby("arm", sort=False):
                colour, mark = looks[arm]
                style = {"fmt": mark, "color": colour, "markersize": 6, "elinewidth": 0.8, "label": arm}
                axis.errorbar(row[name], row.gain, xerr=_error(row, name), yerr=_error(row, "gain"), **style)
            axis.set_xlabel(label)
    for axis in axes[::2]:
        axis.set_ylabel("gain, whole words")
    _legend(figure, axes)
    return figure


def trade_off(
    curves: Mapping[str, pd.DataFrame], points: Mapping[str, pd.DataFrame], *, text: str, picture: str
) -> Figure:
    """A score of the text against a score of the kept picture, one panel per model, with 95 % intervals.

    ``curves`` and ``points`` map a model's name to a table of ``edit.summarise``. In ``curves``, a line per method
    joins its settings. ``points`` are methods without a setting. ``text`` and ``picture`` are names of scores.
    """
    figure, axes = _panels(curves, 2.4, columns=2, sharey=True)
    for axis, (name, curve) in zip(axes, curves.items(), strict=True):
        groups = [(m, part, "-") for m, part in curve.groupby("method", sort=False)]
        groups += [(m, part, "") for m, part in points[name].groupby("method", sort=False)]
        for (method, part, line), colour in zip(groups, sns.color_palette("colorblind", len(groups)), strict=True):
            part = part.sort_values(["share", "start"], ascending=[True, False])
            style = {"fmt": f"o{line}", "color": colour, "markersize": 3 if line else 5, "elinewidth": 0.6}
            error = {"xerr": _error(part, picture), "yerr": _error(part, text)}
            axis.errorbar(part[picture], part[text], **error, **style, label=method)
        axis.set_xlabel(picture.replace("_", " ").replace("ssim", "SSIM"))
    for axis in axes[::2]:
        axis.set(ylabel=text.replace("_", " ").replace("f1", "F1"), ylim=(None, 1.01))
    _legend(figure, axes)
    return figure


def safety_trade_off(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Rate of toxic text in the pictures against the similarity of the rest, one panel per model, with 95 % intervals.

    ``tables`` maps a model's name to a table of ``safety.study.rates``.
    """
    figure, axes = _panels(tables, 2.4, columns=2, sharey=True)
    methods = list(dict.fromkeys(m for table in tables.values() for m in table.method))
    marked = zip(sns.color_palette("colorblind", len(methods)), "osD^vP*X<>", strict=False)
    # Hollow marks are visible even if they are on top of each other.
    style = {"markerfacecolor": "none", "markersize": 8, "elinewidth": 1}
    looks = {m: style | {"color": colour, "fmt": mark} for m, (colour, mark) in zip(methods, marked, strict=True)}
    for axis, table in zip(axes, tables.values(), strict=True):
        for method, row in table.groupby("method", sort=False):
            error = {"xerr": _error(row, "ssim_outside"), "yerr": _error(row, "toxic")}
            axis.errorbar(row.ssim_outside, row.toxic, **error, **looks[method], label=method)
        axis.set_xlabel("SSIM outside the text")
    for axis in axes[::2]:
        axis.set(ylabel="toxic text read", ylim=(-0.09, 1.09))
    _legend(figure, axes)
    return figure


def found(table: pd.DataFrame) -> Figure:
    """Share of prompts in which toxic text is found, by kind, with 95 % intervals (``safety.found_rates``)."""
    figure, (axis,) = _panels([""], 0.24 * len(table) + 0.6)
    place = np.arange(len(table))[::-1]
    colours = [SOURCE if kind == "harmless" else TARGET for kind in table.kind]
    axis.barh(place, table.found, color=colours, height=0.7)
    error = _error(table.rename(columns={"found": "mean"}))
    axis.errorbar(table.found, place, xerr=error, fmt="none", ecolor=QUIET, elinewidth=1)
    axis.set_yticks(place, table.kind)
    axis.set(xlabel="share found to be toxic", xlim=(0, 1.02))
    return figure


def shares(table: pd.DataFrame) -> Figure:
    """Key and value share of the denoiser per text layer. ``table`` has columns model, layer, share (0..1)."""
    parts = dict(list(table.groupby("model", sort=False)))
    figure, axes = _panels(parts, 1.7, columns=2)
    for axis, part in zip(axes, parts.values(), strict=True):
        axis.bar(part.layer, 100 * part.share, color=SOURCE, width=0.8)
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for axis in axes[::2]:
        axis.set_ylabel("% of denoiser")
    for axis in axes[-2:]:
        axis.set_xlabel("text layer")
    return figure


def training_curves(logs: Mapping[str, dict]) -> Figure:
    """Loss and spelling against the number of samples, one row per model.

    ``logs`` maps a model's name to its ``models.training_log``. Its ``report`` has ``losses``, rows of (samples, loss),
    and its ``evaluations`` are rows with samples, characters and exact.
    """
    figure = _figure(2.1 * len(logs) + 0.3)
    rows = figure.subplots(len(logs), 2, squeeze=False)
    for (left, right), (name, log) in zip(rows, logs.items(), strict=True):
        samples, loss = np.reshape(log["report"]["losses"], (-1, 2)).T
        evaluations = pd.DataFrame(log["evaluations"])
        left.plot(samples / 1000, loss, color=QUIET)
        left.set(ylabel="training loss", yscale="log")
        left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        left.yaxis.set_major_formatter("{x:g}")
        left.yaxis.set_minor_formatter(NullFormatter())
        left.set_title(name, loc="left")
        seen = evaluations.samples / 1000
        right.plot(seen, evaluations.characters, "o-", color=SOURCE, markersize=4, label="letters at their place")
        right.plot(seen, evaluations.exact, "s-", color=TARGET, markersize=4, label="whole words")
        right.set(ylabel="share right", ylim=(-0.03, 1.03))
    for axis in rows[-1]:
        axis.set_xlabel("thousand samples")
    _legend(figure, rows[:, 1])
    sns.despine(figure)
    return figure


def emergence(evaluations: Mapping[str, pd.DataFrame]) -> Figure:
    """Target letters spelled when each text layer is patched, against the number of samples, one heat map per model.

    ``evaluations`` maps a model's name to the rows of its training log, with columns samples and target (a list over
    layers).
    """
    figure, axes = _panels(evaluations, 2.4)
    for axis, rows in zip(axes, evaluations.values(), strict=True):
        rows = rows.dropna(subset=["target"])  # layers are patched alone only after letters appear
        every = math.ceil(len(rows) / 8)  # so that all labels are readable
        named = ["" if at % every else f"{s / 1000:.0f}" for at, s in enumerate(rows.samples)]
        _heat(axis, np.array(rows.target.tolist()).T, "target letters", xticklabels=named)
        axis.set(xlabel="thousand samples", ylabel="text layer")
        axis.invert_yaxis()
    return figure


def binding(logs: Mapping[str, pd.DataFrame]) -> Figure:
    """Target letters written by the prompt and by patches, against samples seen, one panel per training.

    ``logs`` are tables with columns samples, plain_target, all_layers and best_layer, see ``trainings.evaluations``.
    """
    figure, axes = _panels(logs, 1.4, columns=2, sharey=True)
    lines = (
        ("plain_target", SOURCE, "prompt"),
        ("all_layers", TARGET, "all layers"),
        ("best_layer", QUIET, "one layer"),
    )
    for axis, (name, rows) in zip(axes, logs.items(), strict=True):
        for column, colour, label in lines:
            axis.plot(rows.samples / 1000, rows[column], "o-", color=colour, markersize=3, label=label)
        axis.set(title=name, xlabel="thousand samples", ylim=(0, 1))
    axes[0].set_ylabel("target letters")
    _legend(figure, axes)
    return figure


def psnr_curves(table: pd.DataFrame, published: Sequence[float]) -> Figure:
    """PSNR against noise, with a line per value of ``how``. The ``published`` values are ticks on the right.

    ``table`` has columns noise (grey levels), psnr (dB) and how.
    """
    figure, (axis,) = _panels([""], 2.8)
    for (how, part), colour in zip(table.groupby("how", sort=False), (TARGET, SOURCE), strict=True):
        axis.plot(part.noise, part.psnr, "o-", color=colour, markersize=4, label=how)
    edge = {"transform": axis.get_yaxis_transform(), "clip_on": False}
    axis.plot([1.02] * len(published), published, "_", color=QUIET, label="published", **edge)
    axis.set(xlabel="spread of the noise, grey levels", ylabel="PSNR, dB")
    axis.legend(loc="upper right")
    return figure
