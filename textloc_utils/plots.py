"""Figures from pictures and tidy tables: each function returns a matplotlib Figure, ``strip`` returns HTML."""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import HTML
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

SOURCE, TARGET, QUIET = "#4878a8", "#c8553d", "#9a9a9a"


def _figure(**options) -> Figure:
    """A figure made by pyplot, so that notebooks know how to show it, and closed, so that they show it once."""
    figure = plt.figure(layout="constrained", **options)
    plt.close(figure)
    return figure


def pictures(images: Sequence[np.ndarray], titles: Sequence[str], *, columns: int = 4, width: float = 9.0) -> Figure:
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


def strip(images: Sequence[np.ndarray], titles: Sequence[str], *, label: str, width: int = 160) -> HTML:
    """Pictures in one row to scroll through, by mouse or keyboard; each title stands below its picture.

    ``images`` are uint8 (H, W, 3), shown ``width`` CSS pixels wide with crisp pixels; ``label`` names the row for
    screen readers.
    """
    cells = []
    for image, title in zip(images, titles, strict=True):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG", optimize=True)
        data, text = base64.b64encode(file.getvalue()).decode(), html.escape(title)
        told = html.escape(f"{label}: {title}")
        cells.append(
            f'<figure style="margin:0;flex:none;width:{width}px">'
            f'<img alt="{told}" src="data:image/png;base64,{data}" style="width:100%;image-rendering:pixelated">'
            f'<figcaption style="font-size:.8em;text-align:center">{text}</figcaption></figure>'
        )
    box = "display:flex;gap:8px;overflow-x:auto;padding-bottom:8px"
    return HTML(
        f'<div role="group" aria-label="{html.escape(label)}" tabindex="0" style="{box}">{"".join(cells)}</div>'
    )


def layer_scores(summary: pd.DataFrame) -> Figure:
    """Target and source letters per patched site, with 95 % intervals (a table of ``localize.summarise``)."""
    figure = _figure(figsize=(9, 3.4))
    axis = figure.subplots()
    place = np.arange(len(summary))
    for score, label, colour, shift in (
        ("target_score", "target text", TARGET, -0.12),
        ("source_score", "source text", SOURCE, 0.12),
    ):
        mean = summary[score].to_numpy()
        error = np.abs(np.stack([mean - summary[f"{score}_low"], summary[f"{score}_high"] - mean]))
        axis.errorbar(place + shift, mean, error, fmt="o", color=colour, capsize=2, markersize=4, label=label)
    axis.set_xticks(place, summary.site.str.replace("layer ", ""), rotation=30, ha="right")
    axis.set(xlabel="patched text layer", ylabel="text score", ylim=(-0.03, 1.03))
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    sns.despine(figure)
    return figure


def effects_by_model(tables: Mapping[str, pd.DataFrame], chosen: Mapping[str, Sequence[int]]) -> Figure:
    """Text effect of each layer alone, one row per model, with 95 % intervals; the chosen layers are marked.

    ``tables`` maps a model's name to a table with columns layer, mean, low and high.
    """
    figure = _figure(figsize=(9, 1.7 * len(tables) + 0.3))
    axes = figure.subplots(len(tables), 1, squeeze=False)[:, 0]
    for axis, (name, table) in zip(axes, tables.items(), strict=True):
        colours = [TARGET if layer in chosen[name] else SOURCE for layer in table.layer]
        axis.bar(table.layer, table["mean"], color=colours, width=0.8)
        error = np.abs(np.stack([table["mean"] - table.low, table.high - table["mean"]]))
        axis.errorbar(table.layer, table["mean"], error, fmt="none", ecolor=QUIET, elinewidth=1)
        axis.set_title(name, loc="left", fontsize=10)
        axis.set(ylabel="text effect", ylim=(min(-0.05, table.low.min()), 1.0))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].set_xlabel("patched text layer, in execution order")
    sns.despine(figure)
    return figure


def carried(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """What each layer carries, one heat map per model (tables of ``studies.carried``)."""
    figure = _figure(figsize=(9, 1.5 * len(tables) + 0.3))
    axes = figure.subplots(len(tables), 1, squeeze=False)[:, 0]
    for axis, (name, table) in zip(axes, tables.items(), strict=True):
        layers = table[table.site.str.match(r"layer \d+$")]
        numbers = layers.site.str.removeprefix("layer ")
        values = layers[["text", "wall", "sign"]].to_numpy().T
        bar = {"label": "share changed"}
        sns.heatmap(values, ax=axis, vmin=0, vmax=1, cmap="rocket_r", xticklabels=numbers, cbar_kws=bar)
        axis.set_yticklabels(["text", "wall", "sign"], rotation=0)
        axis.set_title(name, loc="left", fontsize=10)
    axes[-1].set_xlabel("patched text layer")
    return figure


def windows(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Text effect of patches that start late, and of patches that stop early, one panel per model.

    ``tables`` maps a model's name to a table with columns kind ("from step", "until step"), step, mean, low and high.
    """
    figure = _figure(figsize=(9, 2.6))
    axes = figure.subplots(1, len(tables), squeeze=False, sharey=True)[0]
    for axis, (name, table) in zip(axes, tables.items(), strict=True):
        for (kind, part), colour in zip(table.groupby("kind", sort=False), (TARGET, SOURCE), strict=False):
            error = np.abs(np.stack([part["mean"] - part.low, part.high - part["mean"]]))
            axis.errorbar(part.step, part["mean"], error, fmt="o-", color=colour, capsize=2, markersize=4, label=kind)
        axis.set_title(name, loc="left", fontsize=10)
        axis.set_xlabel("step")
    axes[0].set(ylabel="text effect", ylim=(-0.05, 1.05))
    axes[-1].legend(frameon=False)
    sns.despine(figure)
    return figure


def lengths(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Text effect of the localized set by the words' numbers of letters (tables of ``studies.by_length``)."""
    figure = _figure(figsize=(9, 2.6))
    axes = figure.subplots(1, len(tables), squeeze=False, sharey=True)[0]
    for axis, (name, table) in zip(axes, tables.items(), strict=True):
        grid = table.pivot(index="source", columns="target", values="found")
        sns.heatmap(grid, ax=axis, vmin=0, vmax=1, cmap="rocket_r", annot=True, fmt=".2f", cbar=False)
        axis.set_title(name, loc="left", fontsize=10)
        axis.set(xlabel="letters of the target", ylabel="letters of the source" if axis is axes[0] else "")
    return figure


def adapters(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Text scores of the new and the old task per arm, one panel per model (tables of ``lora_study.summarise``).

    Filled: arms of equal rank; hollow: arms of equal parameters; lines: the model without an adapter.
    """
    figure = _figure(figsize=(9, 2.4 * len(tables) + 0.4))
    axes = figure.subplots(len(tables), 1, squeeze=False, sharex=True)[:, 0]
    for axis, (name, table) in zip(axes, tables.items(), strict=True):
        trained = table[table.equal != ""]
        arms = list(dict.fromkeys(trained.arm))
        for task, label, colour, shift in (("new", "new task", TARGET, -0.15), ("old", "old task", SOURCE, 0.15)):
            axis.axhline(table[task].iloc[0], color=colour, linestyle=":", linewidth=1)
            for equal, fill, nudge in (("rank", colour, -0.05), ("parameters", "white", 0.05)):
                part = trained[trained.equal == equal]
                place = np.array([arms.index(arm) for arm in part.arm]) + shift + nudge
                error = np.abs(np.stack([part[task] - part[f"{task}_low"], part[f"{task}_high"] - part[task]]))
                style = {"fmt": "o", "color": colour, "markerfacecolor": fill, "capsize": 2, "markersize": 5}
                axis.errorbar(place, part[task], error, label=f"{label}, equal {equal}", **style)
        axis.set_xticks(range(len(arms)), arms)
        low = min(table.new_low.min(), table.old_low.min())
        axis.set(ylabel="text score", ylim=(np.floor(10 * low) / 10 - 0.02, 1.02))
        axis.set_title(name, loc="left", fontsize=10)
    axes[0].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    sns.despine(figure)
    return figure


def adapter_losses(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Training loss by step and arm, one panel per model (tables of ``lora_study.curves``, one comparison each)."""
    figure = _figure(figsize=(9, 2.6))
    axes = figure.subplots(1, len(tables), squeeze=False)[0]
    for axis, (name, table) in zip(axes, tables.items(), strict=True):
        for (arm, part), colour in zip(table.groupby("arm", sort=False), sns.color_palette("colorblind"), strict=False):
            axis.plot(part.step, part.loss, color=colour, linewidth=1.3, label=arm)
        axis.set_title(name, loc="left", fontsize=10)
        axis.set_xlabel("training step")
    axes[0].set_ylabel("training loss")
    named = max((axis.get_legend_handles_labels() for axis in axes), key=lambda each: len(each[1]))
    figure.legend(*named, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    sns.despine(figure)
    return figure


def trade_off(
    curves: Mapping[str, pd.DataFrame], points: Mapping[str, pd.DataFrame], *, text: str, picture: str
) -> Figure:
    """What is gained in text against what is kept of the picture, one panel per model, with 95 % intervals.

    Both are tables of ``edit.summarise`` by model: of ``curves`` a line per method joins its settings, ``points`` are
    methods without a dial. ``text`` and ``picture`` name scores.
    """
    figure = _figure(figsize=(9, 3.2))
    axes = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    for axis, (name, curve) in zip(axes, curves.items(), strict=True):
        groups = [(m, part, "-") for m, part in curve.groupby("method", sort=False)]
        groups += [(m, part, "") for m, part in points[name].groupby("method", sort=False)]
        for (method, part, line), colour in zip(groups, sns.color_palette("colorblind", len(groups)), strict=True):
            part = part.sort_values(["share", "start"], ascending=[True, False])
            error = [
                np.abs(np.stack([part[s] - part[f"{s}_low"], part[f"{s}_high"] - part[s]])) for s in (text, picture)
            ]
            axis.errorbar(
                part[picture],
                part[text],
                *error,
                fmt=f"o{line}",
                color=colour,
                markersize=3 if line else 5,
                elinewidth=0.6,
                label=method,
            )
        axis.set_title(name, loc="left", fontsize=10)
        axis.set_xlabel(picture.replace("_", " ").replace("ssim", "SSIM"))
    axes[0].set(ylabel=text.replace("_", " ").replace("f1", "F1"), ylim=(None, 1.01))
    axes[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    sns.despine(figure)
    return figure


def safety_trade_off(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Toxic text left in the pictures against what is left of the rest, one panel per model, with 95 % intervals.

    ``tables`` are ``safety.summarise``'s, by model.
    """
    figure = _figure(figsize=(9, 3.2))
    axes = figure.subplots(1, len(tables), squeeze=False, sharey=True)[0]
    methods = list(dict.fromkeys(m for table in tables.values() for m in table.method))
    looks = dict(
        zip(methods, zip(sns.color_palette("colorblind", len(methods)), "osD^vP*X<>", strict=False), strict=True)
    )
    for axis, (name, table) in zip(axes, tables.items(), strict=True):
        for row in table.to_dict("records"):
            colour, mark = looks[row["method"]]
            errors = [
                np.abs([[row[s] - row[f"{s}_low"]], [row[f"{s}_high"] - row[s]]]) for s in ("ssim_outside", "near")
            ]
            axis.errorbar(
                row["ssim_outside"],
                row["near"],
                xerr=errors[0],
                yerr=errors[1],
                fmt=mark,
                color=colour,
                markerfacecolor="none",  # marks that lie on each other are all seen
                markersize=8,
                elinewidth=1,
                label=row["method"],
            )
        axis.set_title(name, loc="left", fontsize=10)
        axis.set_xlabel("SSIM outside the text")
    axes[0].set(ylabel="toxic text read back", ylim=(-0.04, 1.04))
    axes[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    sns.despine(figure)
    return figure


def found(table: pd.DataFrame) -> Figure:
    """Share of prompts in which toxic text is found, by kind, with 95 % intervals (``safety.found_rates``)."""
    figure = _figure(figsize=(7, 3.6))
    axis = figure.subplots()
    place = np.arange(len(table))[::-1]
    colours = [SOURCE if kind == "harmless" else TARGET for kind in table.kind]
    axis.barh(place, table.found, color=colours, height=0.7)
    error = np.abs(np.stack([table.found - table.low, table.high - table.found]))
    axis.errorbar(table.found, place, xerr=error, fmt="none", ecolor=QUIET, elinewidth=1)
    axis.set_yticks(place, table.kind)
    axis.set(xlabel="share found to be toxic", xlim=(0, 1.02))
    sns.despine(figure)
    return figure


def scores_by_sign(table: pd.DataFrame) -> Figure:
    """Mean target score per patched layer and sign colour (a table of ``localize.sweep``)."""
    layers = table[table.site.str.startswith("layer ")]
    means = layers.pivot_table("target_score", "sign", "site", sort=False)
    figure = _figure(figsize=(9, 2.8))
    axis = figure.subplots()
    names = [site.removeprefix("layer ") for site in means.columns]
    bar = {"label": "target score"}
    sns.heatmap(means, ax=axis, vmin=0, vmax=1, cmap="rocket_r", xticklabels=names, cbar_kws=bar)
    axis.set(xlabel="patched text layer", ylabel="sign")
    axis.tick_params(axis="y", rotation=0)
    return figure


def shares(table: pd.DataFrame, *, columns: int = 2) -> Figure:
    """Key and value share of the denoiser per text layer; ``table`` has columns model, layer, share (0..1)."""
    models = list(dict.fromkeys(table.model))
    rows = -(-len(models) // columns)
    figure = _figure(figsize=(9, 1.8 * rows + 0.2))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axis in grid.ravel()[len(models) :]:
        axis.set_axis_off()
    for axis, model in zip(grid.ravel(), models, strict=False):
        part = table[table.model == model]
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
    figure = _figure(figsize=(9, 2.6 * len(evaluations) + 0.2))
    axes = figure.subplots(len(evaluations), 1, squeeze=False)[:, 0]
    for axis, (name, rows) in zip(axes, evaluations.items(), strict=True):
        every = math.ceil(len(rows) / 16)  # as many labels as can be read
        sns.heatmap(
            np.array(rows.target.tolist()).T,
            ax=axis,
            vmin=0,
            vmax=1,
            cmap="rocket_r",
            xticklabels=["" if at % every else f"{s / 1000:.0f}" for at, s in enumerate(rows.samples)],
            cbar_kws={"label": "target letters"},
        )
        axis.set_title(name, loc="left", fontsize=10)
        axis.set(xlabel="thousand samples", ylabel="text layer")
        axis.invert_yaxis()
    return figure


def psnr_curves(table: pd.DataFrame, published: Sequence[float]) -> Figure:
    """PSNR against noise, a line per value of ``how``; ``published`` figures are ticks on the right.

    ``table`` has columns noise (grey levels), psnr (dB) and how.
    """
    figure = _figure(figsize=(8, 3.2))
    axis = figure.subplots()
    for (how, part), colour in zip(table.groupby("how", sort=False), (TARGET, SOURCE), strict=True):
        axis.plot(part.noise, part.psnr, "o-", color=colour, markersize=4, label=how)
    edge = {"transform": axis.get_yaxis_transform(), "clip_on": False}
    axis.plot([1.02] * len(published), published, "_", color=QUIET, label="published", **edge)
    axis.set(xlabel="spread of the noise, grey levels", ylabel="PSNR, dB")
    axis.legend(frameon=False, loc="upper right")
    sns.despine(figure)
    return figure
