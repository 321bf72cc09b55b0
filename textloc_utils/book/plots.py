"""Figures from pictures and tidy tables: each function returns a matplotlib Figure, ``strip`` returns HTML."""

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import HTML
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

MEAN = ("mean", "low", "high")
HEAT = {"vmin": 0, "vmax": 1, "cmap": "rocket_r"}
SOURCE, TARGET, QUIET = "#4878a8", "#c8553d", "#9a9a9a"


def _figure(**options) -> Figure:
    """A figure made by pyplot, so that notebooks know how to show it, and closed, so that they show it once."""
    figure = plt.figure(layout="constrained", **options)
    plt.close(figure)
    return figure


def _panels(names: Iterable[str], size: tuple[float, float], *, beside: bool = False, **options):
    """A figure of this size in inches and its axes, one per name below or ``beside`` each other, titled by it."""
    names, figure = list(names), _figure(figsize=size)
    axes = figure.subplots(*((1, len(names)) if beside else (len(names), 1)), squeeze=False, **options).ravel()
    for axis, name in zip(axes, names, strict=True):
        axis.set_title(name, loc="left", fontsize=10)
    sns.despine(figure)
    return figure, axes


def _error(table: pd.DataFrame, score: str = "") -> np.ndarray:
    """How far the interval of a score, or of the column mean, reaches below and above it: (2, rows)."""
    mean, low, high = (table[name] for name in ((score, f"{score}_low", f"{score}_high") if score else MEAN))
    return np.abs(np.stack([mean - low, high - mean]))


def pictures(
    images: Sequence[np.ndarray] | np.ndarray, titles: Sequence[str], *, columns: int = 4, width: float = 9.0
) -> Figure:
    """A grid of uint8 pictures (H, W, 3) with a title each; pixels stay crisp."""
    rows = -(-len(images) // columns)
    height, across = images[0].shape[:2]
    cell = width / columns
    figure = _figure(figsize=(width, rows * (cell * height / across + 0.3)))
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, image, title in zip(axes, images, titles, strict=False):
        axis.imshow(image, interpolation="nearest")
        axis.set_title(title, fontsize=9)
    return figure


def strip(images: Sequence[np.ndarray], titles: Sequence[str], *, label: str) -> HTML:
    """Pictures in one row to scroll through, by mouse or keyboard; each title stands below its picture.

    ``images`` are uint8 (H, W, 3), shown 160 CSS pixels wide with crisp pixels; ``label`` names the row for screen
    readers.
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
    figure, (axis,) = _panels([""], (9, 3.4))
    place = np.arange(len(summary))
    for score, label, colour, shift in (
        ("target_score", "target text", TARGET, -0.12),
        ("source_score", "source text", SOURCE, 0.12),
    ):
        style = {"fmt": "o", "color": colour, "capsize": 2, "markersize": 4}
        axis.errorbar(place + shift, summary[score], _error(summary, score), label=label, **style)
    axis.set_xticks(place, summary.layers.where(summary.kind == "layer", summary.site), rotation=30, ha="right")
    axis.set(xlabel="patched text layer", ylabel="text score", ylim=(-0.03, 1.03))
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def effects_by_model(tables: Mapping[str, pd.DataFrame], chosen: Mapping[str, Sequence[int]]) -> Figure:
    """Text effect of each layer alone, one row per model, with 95 % intervals; the chosen layers are marked.

    ``tables`` maps a model's name to a table with columns layer, mean, low and high.
    """
    figure, axes = _panels(tables, (9, 1.7 * len(tables) + 0.3))
    for axis, (name, table) in zip(axes, tables.items(), strict=True):
        colours = [TARGET if layer in chosen[name] else SOURCE for layer in table.layer]
        axis.bar(table.layer, table["mean"], color=colours, width=0.8)
        axis.errorbar(table.layer, table["mean"], _error(table), fmt="none", ecolor=QUIET, elinewidth=1)
        axis.set(ylabel="text effect", ylim=(min(-0.05, table.low.min()), 1.0))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].set_xlabel("patched text layer, in execution order")
    return figure


def carried(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """What each layer carries, one heat map per model (tables of ``layer_contents.carried``)."""
    figure, axes = _panels(tables, (9, 1.5 * len(tables) + 0.3))
    for axis, table in zip(axes, tables.values(), strict=True):
        layers = table[table.kind == "layer"]
        values = layers[["text", "wall", "sign"]].to_numpy().T
        bar = {"label": "share changed"}
        sns.heatmap(values, ax=axis, xticklabels=layers.layers, cbar_kws=bar, **HEAT)
        axis.set_yticklabels(["text", "wall", "sign"], rotation=0)
    axes[-1].set_xlabel("patched text layer")
    return figure


def windows(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Text effect of patches that start late, and of patches that stop early, one panel per model.

    ``tables`` maps a model's name to a table with columns kind ("from step", "until step"), step, mean, low and high.
    """
    figure, axes = _panels(tables, (9, 2.6), beside=True, sharey=True)
    for axis, table in zip(axes, tables.values(), strict=True):
        for (kind, part), colour in zip(table.groupby("kind", sort=False), (TARGET, SOURCE), strict=False):
            style = {"fmt": "o-", "color": colour, "capsize": 2, "markersize": 4}
            axis.errorbar(part.step, part["mean"], _error(part), label=kind, **style)
        axis.set_xlabel("step")
    axes[0].set(ylabel="text effect", ylim=(-0.05, 1.05))
    axes[-1].legend(frameon=False)
    return figure


def lengths(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Text effect of the localized set by the words' numbers of letters (tables of ``layer_contents.by_length``)."""
    figure, axes = _panels(tables, (9, 2.6), beside=True, sharey=True)
    for axis, table in zip(axes, tables.values(), strict=True):
        grid = table.pivot(index="source", columns="target", values="found")
        sns.heatmap(grid, ax=axis, annot=True, fmt=".2f", cbar=False, **HEAT)
        axis.set(xlabel="letters of the target", ylabel="letters of the source" if axis is axes[0] else "")
    return figure


def adapters(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Text scores of the new and the old task per arm, one panel per model (tables of ``lora_study.summarise``).

    Filled: arms of equal rank; hollow: arms of equal parameters; lines: the model without an adapter.
    """
    figure, axes = _panels(tables, (9, 2.4 * len(tables) + 0.4), sharex=True)
    for axis, table in zip(axes, tables.values(), strict=True):
        trained = table[table.equal != ""]
        arms = list(dict.fromkeys(trained.arm))
        for task, label, colour, shift in (("new", "new task", TARGET, -0.15), ("old", "old task", SOURCE, 0.15)):
            axis.axhline(table[task].iloc[0], color=colour, linestyle=":", linewidth=1)
            for equal, fill, nudge in (("rank", colour, -0.05), ("parameters", "white", 0.05)):
                part = trained[trained.equal == equal]
                place = np.array([arms.index(arm) for arm in part.arm]) + shift + nudge
                style = {"fmt": "o", "color": colour, "markerfacecolor": fill, "capsize": 2, "markersize": 5}
                axis.errorbar(place, part[task], _error(part, task), label=f"{label}, equal {equal}", **style)
        axis.set_xticks(range(len(arms)), arms)
        low = min(table.new_low.min(), table.old_low.min())
        axis.set(ylabel="text score", ylim=(np.floor(10 * low) / 10 - 0.02, 1.02))
    axes[0].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    return figure


def adapter_losses(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Training loss by step and arm, one panel per model (tables of ``lora_study.curves``, one comparison each)."""
    figure, axes = _panels(tables, (9, 2.6), beside=True)
    for axis, table in zip(axes, tables.values(), strict=True):
        for (arm, part), colour in zip(table.groupby("arm", sort=False), sns.color_palette("colorblind"), strict=False):
            axis.plot(part.step, part.loss, color=colour, linewidth=1.3, label=arm)
        axis.set_xlabel("training step")
    axes[0].set_ylabel("training loss")
    named = max((axis.get_legend_handles_labels() for axis in axes), key=lambda each: len(each[1]))
    figure.legend(*named, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def trade_off(
    curves: Mapping[str, pd.DataFrame], points: Mapping[str, pd.DataFrame], *, text: str, picture: str
) -> Figure:
    """What is gained in text against what is kept of the picture, one panel per model, with 95 % intervals.

    Both are tables of ``edit.summarise`` by model: of ``curves`` a line per method joins its settings, ``points`` are
    methods without a dial. ``text`` and ``picture`` name scores.
    """
    figure, axes = _panels(curves, (9, 3.2), beside=True, sharey=True)
    for axis, (name, curve) in zip(axes, curves.items(), strict=True):
        groups = [(m, part, "-") for m, part in curve.groupby("method", sort=False)]
        groups += [(m, part, "") for m, part in points[name].groupby("method", sort=False)]
        for (method, part, line), colour in zip(groups, sns.color_palette("colorblind", len(groups)), strict=True):
            part = part.sort_values(["share", "start"], ascending=[True, False])
            style = {"fmt": f"o{line}", "color": colour, "markersize": 3 if line else 5, "elinewidth": 0.6}
            error = {"xerr": _error(part, picture), "yerr": _error(part, text)}
            axis.errorbar(part[picture], part[text], **error, **style, label=method)
        axis.set_xlabel(picture.replace("_", " ").replace("ssim", "SSIM"))
    axes[0].set(ylabel=text.replace("_", " ").replace("f1", "F1"), ylim=(None, 1.01))
    axes[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def safety_trade_off(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Toxic text left in the pictures against what is left of the rest, one panel per model, with 95 % intervals.

    ``tables`` are ``safety.summarise``'s, by model.
    """
    figure, axes = _panels(tables, (9, 3.2), beside=True, sharey=True)
    methods = list(dict.fromkeys(m for table in tables.values() for m in table.method))
    marked = zip(sns.color_palette("colorblind", len(methods)), "osD^vP*X<>", strict=False)
    # Hollow: marks that lie on each other are all seen.
    style = {"markerfacecolor": "none", "markersize": 8, "elinewidth": 1}
    looks = {m: style | {"color": colour, "fmt": mark} for m, (colour, mark) in zip(methods, marked, strict=True)}
    for axis, table in zip(axes, tables.values(), strict=True):
        for method, row in table.groupby("method", sort=False):
            error = {"xerr": _error(row, "ssim_outside"), "yerr": _error(row, "near")}
            axis.errorbar(row.ssim_outside, row.near, **error, **looks[method], label=method)
        axis.set_xlabel("SSIM outside the text")
    axes[0].set(ylabel="toxic text read back", ylim=(-0.04, 1.04))
    axes[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def found(table: pd.DataFrame) -> Figure:
    """Share of prompts in which toxic text is found, by kind, with 95 % intervals (``safety.found_rates``)."""
    figure, (axis,) = _panels([""], (7, 3.6))
    place = np.arange(len(table))[::-1]
    colours = [SOURCE if kind == "harmless" else TARGET for kind in table.kind]
    axis.barh(place, table.found, color=colours, height=0.7)
    error = _error(table.rename(columns={"found": "mean"}))
    axis.errorbar(table.found, place, xerr=error, fmt="none", ecolor=QUIET, elinewidth=1)
    axis.set_yticks(place, table.kind)
    axis.set(xlabel="share found to be toxic", xlim=(0, 1.02))
    return figure


def scores_by_sign(table: pd.DataFrame) -> Figure:
    """Mean target score per patched layer and sign colour (a table of ``sweeps.table``)."""
    means = table[table.kind == "layer"].pivot_table("target_score", "sign", "layers", sort=False)
    figure, (axis,) = _panels([""], (9, 2.8))
    bar = {"label": "target score"}
    sns.heatmap(means, ax=axis, xticklabels=list(means), cbar_kws=bar, **HEAT)
    axis.set(xlabel="patched text layer", ylabel="sign")
    axis.tick_params(axis="y", rotation=0)
    return figure


def shares(table: pd.DataFrame) -> Figure:
    """Key and value share of the denoiser per text layer; ``table`` has columns model, layer, share (0..1)."""
    parts = dict(list(table.groupby("model", sort=False)))
    rows = -(-len(parts) // 2)
    figure = _figure(figsize=(9, 1.8 * rows + 0.2))
    grid = figure.subplots(rows, 2, squeeze=False)
    for axis in grid.ravel()[len(parts) :]:
        axis.set_axis_off()
    for axis, (model, part) in zip(grid.ravel(), parts.items(), strict=False):
        axis.bar(part.layer, 100 * part.share, color=SOURCE, width=0.8)
        axis.set_title(model, loc="left", fontsize=10)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in grid[:, 0]:
        axis.set_ylabel("% of denoiser")
    for axis in grid[-1]:
        axis.set_xlabel("text layer, in execution order")
    sns.despine(figure)
    return figure


def training_curves(logs: Mapping[str, dict]) -> Figure:
    """Loss and spelling against samples seen, one row per model.

    ``logs`` maps a model's name to its ``models.training_log``: ``report`` with ``losses``, rows of (samples, loss),
    and ``evaluations``, rows with samples, characters and exact.
    """
    figure = _figure(figsize=(9, 2.4 * len(logs)))
    rows = figure.subplots(len(logs), 2, squeeze=False)
    for (left, right), (name, log) in zip(rows, logs.items(), strict=True):
        samples, loss = np.reshape(log["report"]["losses"], (-1, 2)).T
        evaluations = pd.DataFrame(log["evaluations"])
        left.plot(samples / 1000, loss, color=QUIET)
        left.set(ylabel="training loss", yscale="log")
        left.set_title(name, loc="left", fontsize=10)
        seen = evaluations.samples / 1000
        right.plot(seen, evaluations.characters, "o-", color=SOURCE, markersize=4, label="letters at their place")
        right.plot(seen, evaluations.exact, "s-", color=TARGET, markersize=4, label="whole words")
        right.set(ylabel="share, held-out words", ylim=(-0.03, 1.03))
    for axis in rows[-1]:
        axis.set_xlabel("thousand samples")
    rows[0, 1].legend(frameon=False)
    sns.despine(figure)
    return figure


def emergence(evaluations: Mapping[str, pd.DataFrame]) -> Figure:
    """Target letters spelled when each text layer is patched, against samples seen, one heat map per model.

    ``evaluations`` maps a model's name to its training log's rows: columns samples and target (a list over layers).
    """
    figure, axes = _panels(evaluations, (9, 2.6 * len(evaluations) + 0.2))
    for axis, rows in zip(axes, evaluations.values(), strict=True):
        every = math.ceil(len(rows) / 16)  # as many labels as can be read
        named = ["" if at % every else f"{s / 1000:.0f}" for at, s in enumerate(rows.samples)]
        bar = {"label": "target letters"}
        sns.heatmap(np.array(rows.target.tolist()).T, ax=axis, xticklabels=named, cbar_kws=bar, **HEAT)
        axis.set(xlabel="thousand samples", ylabel="text layer")
        axis.invert_yaxis()
    return figure


def psnr_curves(table: pd.DataFrame, published: Sequence[float]) -> Figure:
    """PSNR against noise, a line per value of ``how``; ``published`` figures are ticks on the right.

    ``table`` has columns noise (grey levels), psnr (dB) and how.
    """
    figure, (axis,) = _panels([""], (8, 3.2))
    for (how, part), colour in zip(table.groupby("how", sort=False), (TARGET, SOURCE), strict=True):
        axis.plot(part.noise, part.psnr, "o-", color=colour, markersize=4, label=how)
    edge = {"transform": axis.get_yaxis_transform(), "clip_on": False}
    axis.plot([1.02] * len(published), published, "_", color=QUIET, label="published", **edge)
    axis.set(xlabel="spread of the noise, grey levels", ylabel="PSNR, dB")
    axis.legend(frameon=False, loc="upper right")
    return figure
