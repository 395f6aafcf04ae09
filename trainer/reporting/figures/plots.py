"""Numbers as figures: the curves of a run, the confusion matrix of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from trainer.reporting.figures.style import (
    BLUE,
    FAINT,
    INK,
    QUIET,
    SMALL,
    TEXT,
    TITLE,
    VERMILION,
    Floats,
    fitting,
    new_figure,
    shorten,
    write,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_NUMBERED_CLASSES, MOST_NAMED_CLASSES = 20, 60


def curves(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """The rows of `metrics.jsonl` over the steps: a panel for the loss, for each other metric, and for `lr`.

    `train/x` is drawn thin, as it is of few samples; `train/epoch_x` and `val/x` with a mark for each epoch.
    """
    from matplotlib.ticker import MaxNLocator

    keys = dict.fromkeys(key for row in rows for key in row if key.startswith(("train/", "val/")))
    names = dict.fromkeys(["loss", *(key.partition("/")[2].removeprefix("epoch_") for key in keys)])
    figure = new_figure(7.5, 2.5 * len(names) + 1.6)
    ratios = [2.5] * len(names) + [1.2]
    panels = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    marked = {"marker": "o", "markevery": 1}
    for axes, name in zip(panels, names, strict=False):
        _plot(axes, rows, f"train/{name}", label="train", color=BLUE, linewidth=0.9, alpha=0.75)
        _plot(axes, rows, f"train/epoch_{name}", label="train, epoch", color=BLUE, linewidth=1.6, **marked)
        _plot(axes, rows, f"val/{name}", label="val", color=VERMILION, linewidth=1.6, **marked)
        _style_panel(axes, name)
        if axes.lines:
            corner = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.1}  # beside the title
            axes.legend(**corner, ncols=3, frameon=False, fontsize=SMALL, labelcolor=INK)
    _plot(panels[-1], rows, "lr", color=QUIET, linewidth=1.4)
    _style_panel(panels[-1], "learning rate")
    panels[-1].set_ylim(bottom=0)
    panels[-1].xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    panels[-1].xaxis.set_major_formatter("{x:,.0f}")
    panels[-1].set_xlabel("step", fontsize=TEXT, color=INK)
    write(figure, path)


def _plot(axes: Axes, rows: Sequence[Mapping[str, float]], key: str, **style: Any) -> None:
    """One series. A value that is no finite number leaves a gap; one that stands between gaps gets a mark."""
    points = [(row["step"], row[key]) for row in rows if key in row]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    finite = np.isfinite(values)
    neighbours = np.pad(finite, 1)
    alone = finite & ~neighbours[:-2] & ~neighbours[2:]
    marks = {"marker": "o", "markevery": np.flatnonzero(alone)} if alone.any() else {}
    if finite.any():
        axes.plot(steps, np.where(finite, values, np.nan), **{"markersize": 3.5, **marks, **style})


def _style_panel(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=TITLE, color=INK, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(colors=QUIET, labelcolor=INK, labelsize=SMALL)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_formatter("{x:g}")
    if not axes.lines:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no finite values", transform=axes.transAxes, ha="center", fontsize=TEXT, color=QUIET)


def confusion_matrix(matrix: Tensor, classes: Sequence[str], path: Path) -> None:
    """Counts `(C, C)`, rows the true class and columns the predicted one; the colour is the share of the row."""
    from matplotlib.colors import PowerNorm

    counts = matrix.detach().to("cpu", torch.float64).numpy()
    size, total = len(counts), counts.sum()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(max(2.6, 0.42 * size), 8.4)
    figure = new_figure(side + 2.2, side + 1.4)
    axes = figure.subplots()
    # A root lets rare errors show beside a diagonal that is nearly 1, a higher one where they are but a dot.
    norm = PowerNorm(1 / 2 if size <= MOST_NUMBERED_CLASSES else 1 / 3, 0, 1)
    image = axes.imshow(shares, cmap="Blues", norm=norm, interpolation="nearest")
    if size <= MOST_NUMBERED_CLASSES:
        _write_counts(axes, counts, shares)
    _name_classes(axes, classes, room=fitting(side / size))
    axes.spines[:].set_visible(False)
    right = counts.trace() / max(total, 1)
    axes.set_title(f"{total:,.0f} samples · accuracy {right:.4f}", loc="left", fontsize=TITLE, color=INK)
    axes.set_xlabel("predicted", fontsize=TEXT, color=INK)
    axes.set_ylabel("true", fontsize=TEXT, color=INK)
    ticks = [0, 0.01, 0.1, 0.25, 0.5, 1]
    bar = figure.colorbar(image, ax=axes, shrink=0.5, aspect=18, pad=0.02, ticks=ticks, format="%g")
    bar.set_label("share of the true class", fontsize=SMALL, color=INK)
    bar.ax.tick_params(colors=QUIET, labelcolor=INK, labelsize=SMALL)
    bar.outline.set_visible(False)
    write(figure, path, cropped=True)


def _write_counts(axes: Axes, counts: Floats, shares: Floats) -> None:
    longest = len(f"{counts.max():.0f}")
    font = min(TEXT, 36 / longest)  # points; a cell is 0.42 inches wide
    for (row, column), count in np.ndenumerate(counts):
        colour = "white" if shares[row, column] > 0.3 else INK if count else "#BBBBBB"
        axes.text(column, row, f"{count:.0f}", ha="center", va="center", fontsize=font, color=colour)


def _name_classes(axes: Axes, classes: Sequence[str], room: int) -> None:
    """Names at the ticks, upright where a column has no `room` for their characters; numbers for many classes."""
    axes.tick_params(length=0, labelcolor=INK, labelsize=SMALL)
    if len(classes) > MOST_NAMED_CLASSES:
        return
    names = [shorten(name, 24) for name in classes]
    places = range(len(names))
    upright = max(map(len, names)) > room
    axes.set_yticks(places, names, parse_math=False)
    axes.set_xticks(places, names, parse_math=False, rotation=90 if upright else 0)
