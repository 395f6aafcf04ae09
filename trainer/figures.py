"""A run's PNG figures, in one look. Drawn on matplotlib's own objects: no pyplot, no global state, no display."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.files import sync

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Blue and vermilion of Okabe and Ito's palette (2008): told apart with any colour vision, and in grey.
BLUE, VERMILION = "#0072B2", "#D55E00"
INK, QUIET, FAINT = "#262626", "#767676", "#E4E4E4"
TITLE, TEXT, SMALL = 10, 9, 8  # points
DPI = 144
MOST_IMAGES = 64
MOST_NUMBERED_CLASSES, MOST_NAMED_CLASSES = 20, 60

Floats = npt.NDArray[np.float64]


def curves(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """The rows of `metrics.jsonl` over the steps: a panel for the loss, for each other metric, and for `lr`.

    `train/x` is drawn thin, as it is of few samples; `train/epoch_x` and `val/x` with a mark for each epoch.
    """
    from matplotlib.ticker import MaxNLocator

    keys = dict.fromkeys(key for row in rows for key in row if key.startswith(("train/", "val/")))
    names = dict.fromkeys(["loss", *(key.partition("/")[2].removeprefix("epoch_") for key in keys)])
    figure = _figure(7.5, 2.5 * len(names) + 1.6)
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
    _write(figure, path)


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


def batch_grid(images: Tensor, labels: Sequence[str], path: Path) -> None:
    """Up to 64 images, float `(N, C, H, W)` in [0, 1], in a near-square grid, its label above each."""
    count = min(len(images), MOST_IMAGES)
    columns = math.ceil(math.sqrt(count))
    cell = min(max(1.1, 6 / columns), 2.0)
    titles = [_shorten(label, _fitting(cell)) for label in labels[:count]]
    _image_grid(images[:count], titles, [INK] * count, path, columns=columns, cell=cell)


def predictions(
    images: Tensor, predicted: Sequence[str], true: Sequence[str], confidence: Sequence[float] | None, path: Path
) -> None:
    """Images, float `(N, C, H, W)` in [0, 1], below what a model took them for and what they are.

    Blue where the two agree, vermilion where not.
    """
    cell = 2.0
    titles, colours = [], []
    for i, (guess, truth) in enumerate(zip(predicted, true, strict=True)):
        sure = "" if confidence is None else f" · {100 * confidence[i]:.0f} %"
        title = _shorten(guess, _fitting(cell) - len(sure)) + sure
        titles.append(f"{title}\n{_shorten(f'true: {truth}', _fitting(cell))}")
        colours.append(BLUE if guess == truth else VERMILION)
    _image_grid(images, titles, colours, path, columns=min(3, len(images)), cell=cell)


def _image_grid(
    images: Tensor, titles: Sequence[str], colours: Sequence[str], path: Path, *, columns: int, cell: float
) -> None:
    """Each image in a square of `cell` inches, its title centred above it in its colour."""
    pictures = _pictures(images)
    height, width = pictures.shape[1:3]
    across, down = cell * min(1, width / height), cell * min(1, height / width)
    title = 1.4 * SMALL / 72 * max(text.count("\n") + 1 for text in titles)
    gap = 0.12
    rows = math.ceil(len(pictures) / columns)
    size = columns * (cell + gap) + gap, rows * (title + down + gap) + gap
    figure = _figure(*size)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    for i, (picture, text, colour) in enumerate(zip(pictures, titles, colours, strict=False)):
        row, column = divmod(i, columns)
        middle = gap + column * (cell + gap) + cell / 2
        top = gap + row * (title + down + gap) + title
        extent = (middle - across / 2, middle + across / 2, top + down, top)
        axes.imshow(picture, extent=extent, cmap="gray", vmin=0, vmax=1, aspect="auto", interpolation="auto")
        axes.text(middle, top - 0.04, text, ha="center", va="bottom", fontsize=SMALL, color=colour, parse_math=False)
    axes.set(xlim=(0, size[0]), ylim=(size[1], 0))  # in inches, from the top left
    _write(figure, path)


def _pictures(images: Tensor) -> Floats:
    """`(N, H, W, 3)` for colour images, else `(N, H, W)`, the first channel."""
    held = images.detach().to("cpu", torch.float64).nan_to_num().clamp(0, 1)
    shown: Floats = (held.permute(0, 2, 3, 1) if held.shape[1] == 3 else held[:, 0]).numpy()
    return shown


def confusion_matrix(matrix: Tensor, classes: Sequence[str], path: Path) -> None:
    """Counts `(C, C)`, rows the true class and columns the predicted one; the colour is the share of the row."""
    from matplotlib.colors import PowerNorm

    counts = matrix.detach().to("cpu", torch.float64).numpy()
    size, total = len(counts), counts.sum()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(max(2.6, 0.42 * size), 8.4)
    figure = _figure(side + 2.2, side + 1.4)
    axes = figure.subplots()
    # A root lets rare errors show beside a diagonal that is nearly 1, a higher one where they are but a dot.
    norm = PowerNorm(1 / 2 if size <= MOST_NUMBERED_CLASSES else 1 / 3, 0, 1)
    image = axes.imshow(shares, cmap="Blues", norm=norm, interpolation="nearest")
    if size <= MOST_NUMBERED_CLASSES:
        _write_counts(axes, counts, shares)
    _name_classes(axes, classes, room=_fitting(side / size))
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
    _write(figure, path, cropped=True)


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
    names = [_shorten(name, 20) for name in classes]
    places = range(len(names))
    upright = max(map(len, names)) > room
    axes.set_yticks(places, names, parse_math=False)
    axes.set_xticks(places, names, parse_math=False, rotation=90 if upright else 0)


def _shorten(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _fitting(width: float) -> int:
    """About how many characters of small text fit in `width` inches."""
    return int(width * 72 / (0.58 * SMALL))


def _figure(width: float, height: float) -> Figure:
    """A white figure of `width` × `height` inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _write(figure: Figure, path: Path, *, cropped: bool = False) -> None:
    """Write a figure whole or not at all; `cropped`, without its empty margins."""
    partial = path.with_name(f".{path.stem}.partial.png")
    try:
        figure.savefig(partial, bbox_inches="tight" if cropped else None)
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
