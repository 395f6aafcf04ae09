"""What all figures share: colours, sizes, and how a figure is created and written."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from trainer.reporting.figures.fonts import use_fonts_that_can_write
from trainer.storage.files import new_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Blue and vermilion of Okabe and Ito's palette (2008): distinct in any colour vision, and in greyscale.
BLUE, VERMILION = "#0072B2", "#D55E00"
INK, GREY, FAINT = "#262626", "#767676", "#E4E4E4"
TITLE, TEXT, SMALL = 10, 9, 8  # font sizes, in points
DPI = 144

Floats = npt.NDArray[np.float64]


def shorten(name: str, length: int) -> str:
    """The name in at most `length` characters: its start and its end, where similar long names differ."""
    if len(name) <= length:
        return name
    end = (length - 1) // 3
    start = length - 1 - end
    return f"{name[:start]}…{name[len(name) - end :]}"


def fitting_characters(width: float) -> int:
    """About how many characters of small text fit in `width` inches."""
    return int(width * 72 / (0.58 * SMALL))


def new_figure(width: float, height: float) -> Figure:
    """A white figure of `width` × `height` inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white"
    )
    FigureCanvasAgg(figure)
    return figure


def style_axes(axes: Axes, *, grid: Literal["both", "y"]) -> None:
    """Two spines, small ticks, and behind the data a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=GREY, labelcolor=INK, labelsize=SMALL)
    axes.grid(axis=grid, color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)


def write(figure: Figure, path: Path, *, cropped: bool = False) -> None:
    """Write a figure as PNG, completely or not at all; `cropped` removes its empty margins."""
    use_fonts_that_can_write(figure)
    # savefig writes in pieces: a full disk must not destroy the figure of an earlier session.
    with new_file(path) as partial, warnings.catch_warnings():
        # A class name in a script that no font here has: each warning would be one character.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(partial, bbox_inches="tight" if cropped else None)
