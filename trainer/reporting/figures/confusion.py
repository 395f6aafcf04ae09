"""A classifier's mistakes: the confusion matrix as a picture, and a table of its classes."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from trainer.core.evaluation import Decision
from trainer.reporting.figures.style import (
    GREY,
    INK,
    SMALL,
    TEXT,
    TITLE,
    Floats,
    fitting_characters,
    new_figure,
    shorten,
    write,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_NUMBERED_CLASSES = 20  # counts are written into the cells up to here
MAX_NAMED_CLASSES = 60
CELL = 0.42  # inches, of a matrix that need not shrink
DARK_SHARE = 0.3  # cells of a larger share are too dark for dark text

Counts = npt.NDArray[np.int64]
TABLE_COLUMNS = (
    "class",
    "precision",
    "recall",
    "f1",
    "support",
    "most confused with",
    "times",
)


def count_decisions(decisions: Sequence[Decision], classes: int = 0) -> Counts:
    """How often each class (row) was predicted as each class (column), `(C, C)`, C at least `classes`."""
    from sklearn.metrics import confusion_matrix

    true, predicted = _columns(decisions)
    size = max(classes, 1 + max(true + predicted))
    counts: Counts = confusion_matrix(true, predicted, labels=range(size))
    return counts


def class_table(
    decisions: Sequence[Decision], counts: Counts, names: Sequence[str]
) -> str:
    """As CSV: precision, recall, F1 and support of every class that has samples, and its most frequent mistake.

    `counts` and `names` are those of all classes: the matrix `count_decisions` returns, and one name for each row.
    """
    from sklearn.metrics import precision_recall_fscore_support

    true, predicted = _columns(decisions)
    scores = precision_recall_fscore_support(
        true, predicted, labels=range(len(names)), zero_division=0
    )
    precision, recall, f1, support = scores
    # The largest count off the diagonal; 0 where a class is never mistaken.
    mistakes = counts.copy()
    np.fill_diagonal(mistakes, 0)
    confused_with = mistakes.argmax(axis=1)

    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(TABLE_COLUMNS)
    for i in np.flatnonzero(support).tolist():
        other = confused_with[i]
        times = mistakes[i, other]
        rounded = np.round([precision[i], recall[i], f1[i]], 6)
        mistaken_for = names[other] if times else ""
        table.writerow([names[i], *rounded, support[i], mistaken_for, times])
    return text.getvalue()


def pixel_table(counts: Counts, names: Sequence[str]) -> str:
    """As CSV: IoU, precision, recall and pixels of every class that is predicted or true somewhere."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("class", "iou", "precision", "recall", "pixels"))
    predicted_pixels = counts.sum(axis=0)
    true_pixels = counts.sum(axis=1)
    for i, right in enumerate(counts.diagonal().tolist()):
        predicted, true = predicted_pixels[i], true_pixels[i]
        union = predicted + true - right
        if union:
            iou = right / union
            precision = right / max(predicted, 1)
            recall = right / max(true, 1)
            rounded = np.round([iou, precision, recall], 6)
            table.writerow([names[i], *rounded, true])
    return text.getvalue()


def _columns(decisions: Sequence[Decision]) -> tuple[list[int], list[int]]:
    """The true and the predicted classes."""
    true = [decision.true for decision in decisions]
    predicted = [decision.predicted for decision in decisions]
    return true, predicted


def draw_confusion_matrix(
    counts: Counts, classes: Sequence[str], path: Path, counted: str = "samples"
) -> None:
    """Draw counts `(C, C)`, a row for each true class; the colour is the share of the row. `counted` is what of."""
    from matplotlib.colors import PowerNorm

    size = len(counts)
    side = min(max(2.6, CELL * size), 8.4)
    # Shares of a row, because classes may differ in size; a class without samples has a row of zeros.
    row_totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(row_totals, 1)
    figure = new_figure(side + 2.2, side + 1.4)
    axes = figure.subplots()
    # A square root makes rare mistakes visible beside a diagonal near 1; cells of a few pixels need a cube root.
    is_small = size <= MAX_NUMBERED_CLASSES
    norm = PowerNorm(1 / 2 if is_small else 1 / 3, 0, 1)
    axes.imshow(shares, cmap="Blues", norm=norm, interpolation="nearest")
    if is_small:
        _write_counts(axes, counts, shares)
    _name_classes(axes, classes, room=fitting_characters(side / size))
    axes.spines[:].set_visible(False)
    total = counts.sum()
    accuracy = counts.trace() / max(total, 1)
    axes.set_title(
        f"{total:,} {counted} · accuracy {accuracy:.4f}",
        loc="left",
        fontsize=TITLE,
        color=INK,
    )
    axes.set_xlabel("predicted", fontsize=TEXT, color=INK)
    axes.set_ylabel("true", fontsize=TEXT, color=INK)
    _add_colour_bar(figure, axes)
    write(figure, path, cropped=True)


def _write_counts(axes: Axes, counts: Counts, shares: Floats) -> None:
    longest = len(str(counts.max()))
    font = min(TEXT, 36 / longest)  # points; what fits in a cell
    for (row, column), count in np.ndenumerate(counts):
        if shares[row, column] > DARK_SHARE:
            colour = "white"
        elif count:
            colour = INK
        else:
            colour = "#BBBBBB"
        axes.text(
            column,
            row,
            str(count),
            ha="center",
            va="center",
            fontsize=font,
            color=colour,
        )


def _name_classes(axes: Axes, classes: Sequence[str], room: int) -> None:
    """Write the classes' names at the ticks, upright if a column has no `room` for their characters.

    With too many classes for names the ticks keep matplotlib's numbers.
    """
    axes.tick_params(length=0, labelcolor=INK, labelsize=SMALL)
    if len(classes) > MAX_NAMED_CLASSES:
        return
    names = [shorten(name, 24) for name in classes]
    longest = max(map(len, names))
    positions = range(len(names))
    rotation = 90 if longest > room else 0
    axes.set_yticks(positions, names, parse_math=False)
    axes.set_xticks(positions, names, parse_math=False, rotation=rotation)


def _add_colour_bar(figure: Figure, axes: Axes) -> None:
    ticks = [0, 0.01, 0.1, 0.25, 0.5, 1]
    bar = figure.colorbar(
        axes.images[0],
        ax=axes,
        shrink=0.5,
        aspect=18,
        pad=0.02,
        ticks=ticks,
        format="%g",
    )
    bar.set_label("share of the true class", fontsize=SMALL, color=INK)
    bar.ax.tick_params(colors=GREY, labelcolor=INK, labelsize=SMALL)
    bar.outline.set_visible(False)
