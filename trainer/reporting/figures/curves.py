"""The curves of a run: its logged values over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.core.evaluated_weights import evaluated_phase
from trainer.reporting.figures.style import (
    BLUE,
    GREY,
    INK,
    SMALL,
    TEXT,
    TITLE,
    VERMILION,
    new_figure,
    style_axes,
    write,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

Rows = Sequence[Mapping[str, float]]
Points = Sequence[tuple[float, float]]  # steps and values

PANEL_HEIGHT = 2.5  # inches
RATE_PANEL_HEIGHT = 1.2  # one line without noise needs less
LEAST_RATIO = 4  # of the largest loss to the least, for a logarithmic axis
# Of Okabe and Ito's palette, as those of the rest.
COLOURS_OF_SETS = (VERMILION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINES = {"val": "-", "val_ema": "--"}  # of the weights, and of their average
EPOCH_LINE: dict[str, Any] = {"linewidth": 1.6, "marker": "o", "markevery": 1}


def draw_curves(
    rows: Rows,
    path: Path,
    sets: Sequence[str] = (),
    rates: Points | None = None,
) -> None:
    """Draw the rows of `metrics.jsonl`: a panel for the loss, one for each other metric, and one for `lr`.

    `sets` are the names of validation sets: `val/<name>/x` is a line of its own in the panel of `x`.

    `train/x` is a thin line, because it is the mean of few samples; `train/epoch_x` and `val/x` have a mark for each
    epoch, the former in its middle, as it is a mean over the epoch, the latter at its end; `val_ema/x` is dashed.
    Losses of many sizes have a logarithmic axis. `rates` are learning rates by step, drawn in place of the rows' few. A
    metric without finite values gets an empty panel that says so.
    """
    rows = _with_middles(rows)
    phases = [f"val/{name}" for name in sets] or ["val"]
    names = _metric_names(rows, phases)
    heights = [PANEL_HEIGHT] * len(names) + [RATE_PANEL_HEIGHT]
    figure = new_figure(7.5, PANEL_HEIGHT * len(names) + 1.6)
    grid = figure.subplots(
        len(heights), 1, sharex=True, squeeze=False, height_ratios=heights
    )
    *panels, rate_panel = grid[:, 0]
    for axes, name in zip(panels, names, strict=True):
        _draw_metric(axes, rows, name, phases)
    _draw_rates(rate_panel, rows, rates)
    _style_step_axis(rate_panel)
    write(figure, path)


def _draw_metric(axes: Axes, rows: Rows, name: str, phases: Sequence[str]) -> None:
    """The panel of one metric: its lines in training and in each of the `phases`."""
    train = {"color": BLUE, "linewidth": 0.9, "alpha": 0.75}
    _plot(axes, rows, f"train/{name}", label="train", **train)
    _plot(
        axes,
        rows,
        f"train/epoch_{name}",
        label="train, epoch",
        color=BLUE,
        **EPOCH_LINE,
    )
    for index, phase in enumerate(phases):
        colour = COLOURS_OF_SETS[index % len(COLOURS_OF_SETS)]
        for evaluation, line in LINES.items():
            evaluated = evaluated_phase(phase, evaluation)
            _plot(
                axes,
                rows,
                f"{evaluated}/{name}",
                label=evaluated,
                color=colour,
                linestyle=line,
                **EPOCH_LINE,
            )
    _style_panel(axes, name)
    if name.endswith("loss"):
        _scale_by_factors(axes)
    _add_legend(axes)


def _draw_rates(axes: Axes, rows: Rows, rates: Points | None) -> None:
    if rates is None:
        _plot(axes, rows, "lr", color=GREY, linewidth=1.4)
    else:
        steps, values = np.array(rates, dtype=float).reshape(-1, 2).T
        axes.step(steps, values, where="post", color=GREY, linewidth=1.4)
    _style_panel(axes, "learning rate")
    # A constant rate would otherwise fill a tiny range around itself.
    axes.set_ylim(bottom=0)


def _with_middles(rows: Rows) -> Rows:
    """The rows with those of epochs split: what is a mean over the epoch stands at its middle, the rest at its end."""
    split: list[Mapping[str, float]] = []
    start = 0.0
    for row in rows:
        means = {}
        others = {}
        for name, value in row.items():
            if name.startswith("train/epoch_"):
                means[name] = value
            else:
                others[name] = value
        if not means:
            split.append(row)
            continue
        middle = (start + row["step"]) / 2
        split.append({"step": middle, **means})
        split.append(others)
        start = row["step"]
    return split


def _scale_by_factors(axes: Axes) -> None:
    """A logarithmic axis, if all values are above 0 and the largest is several times the least."""
    from matplotlib.ticker import LogLocator, NullFormatter

    drawn: list[float] = []
    for line in axes.lines:
        drawn += _values_of(line)
    values = np.array(drawn)
    values = values[np.isfinite(values)]
    if not len(values) or values.min() <= 0:
        return
    if values.max() < LEAST_RATIO * values.min():
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _values_of(line: Line2D) -> list[float]:
    values: list[float] = np.asarray(line.get_ydata(), dtype=float).tolist()
    return values


def _metric_names(rows: Rows, phases: Sequence[str]) -> list[str]:
    """The metrics of the rows in the order in which they appear, the loss first."""
    names = ["loss"]
    keys = dict.fromkeys(chain.from_iterable(rows))
    for key in keys:
        for phase in ("train", *phases):
            name = key.removeprefix(f"{phase}/")
            if name != key:
                names.append(name.removeprefix("epoch_"))
    return list(dict.fromkeys(names))


def _plot(axes: Axes, rows: Rows, key: str, **style: Any) -> None:
    """Plot one series. A value that is not finite leaves a gap; one between two gaps gets a mark, to be visible."""
    points = [(row["step"], row[key]) for row in rows if key in row]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    finite = np.isfinite(values)
    if not finite.any():
        return
    # A line connects two finite neighbours, so a value without any would be invisible.
    padded = np.pad(finite, 1)
    before, after = padded[:-2], padded[2:]
    isolated = finite & ~before & ~after
    if isolated.any():
        style = {"marker": "o", "markevery": np.flatnonzero(isolated)} | style
    axes.plot(steps, np.where(finite, values, np.nan), markersize=3.5, **style)


def _style_panel(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=TITLE, color=INK, parse_math=False)
    style_axes(axes, grid="y")
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.yaxis.set_major_formatter("{x:g}")
    if not axes.lines:
        axes.set_yticks([])
        axes.text(
            0.5,
            0.5,
            "no finite values",
            transform=axes.transAxes,
            ha="center",
            fontsize=TEXT,
            color=GREY,
        )


def _add_legend(axes: Axes) -> None:
    if not axes.lines:
        return
    legend = axes.legend(
        loc="lower right",
        ncols=4,
        frameon=False,
        fontsize=SMALL,
        labelcolor=INK,
        borderaxespad=0.1,
    )
    # Beside the title, above the panel.
    legend.set_bbox_to_anchor((1, 1), transform=axes.transAxes)


def _style_step_axis(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("step", fontsize=TEXT, color=INK)
