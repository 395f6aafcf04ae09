"""Images in a grid: a batch, a model's predictions, and what the predictions rest on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from trainer.reporting.figures.style import (
    BLUE,
    INK,
    SMALL,
    TITLE,
    VERMILION,
    Floats,
    fitting_characters,
    new_figure,
    shorten,
    write,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_IMAGES = 64  # of a batch: more are too small to be seen
GAP = 0.12  # inches between cells
HEADING = 0.36  # inches, the height of a heading


@dataclass(frozen=True)
class PredictionGroup:
    """Images, float `(N, C, H, W)` in [0, 1], with each one's predicted class, confidence in [0, 1] and true class."""

    heading: str
    images: Tensor
    predicted: Sequence[str]
    confidence: Sequence[float]
    true: Sequence[str]


def draw_batch_grid(images: Tensor, labels: Sequence[str], path: Path) -> None:
    """Draw up to 64 images, float `(N, C, H, W)` in [0, 1], in a near-square grid, each below its label."""
    images = images[:MAX_IMAGES]
    columns = math.ceil(math.sqrt(len(images)))
    # Inches: the grid is about six wide, unless its cells would be too small or too large.
    cell = min(max(1.1, 6 / columns), 2.0)
    room = fitting_characters(cell)
    titles = [shorten(label, room) for label in labels[: len(images)]]
    colours = [INK] * len(images)
    block = _Block("", _to_pictures(images), titles, colours)
    _draw_grid([block], path, columns=columns, cell=cell)


def draw_pictures(
    heading: str,
    images: Tensor,
    titles: Sequence[str],
    colours: Sequence[str],
    path: Path,
) -> None:
    """Draw images, float `(N, C, H, W)` in [0, 1], under one heading, each below its title in its colour."""
    height, width = images.shape[-2:]
    is_wide = width > 1.5 * height  # as two pictures side by side are
    cell, columns = (3.0, 3) if is_wide else (1.8, 4)
    room = fitting_characters(cell)
    shortened = []
    for title in titles:
        lines = [shorten(line, room) for line in title.split("\n")]
        shortened.append("\n".join(lines))
    block = _Block(heading, _to_pictures(images), shortened, colours)
    _draw_grid([block], path, columns=columns, cell=cell)


def draw_predictions(groups: Sequence[PredictionGroup], path: Path) -> None:
    """Draw images with their predictions, one group below the other."""
    cell = 1.8
    blocks = []
    for group in groups:
        pictures = _to_pictures(group.images)
        blocks.append(_to_block(group, pictures, cell))
    _draw_grid(blocks, path, columns=4, cell=cell)


def draw_saliency(group: PredictionGroup, maps: Tensor, path: Path) -> None:
    """Draw each image, and beside it the same in grey below its saliency map, `maps` `(N, H, W)` in [0, 1]."""
    from matplotlib import colormaps

    pictures = _to_pictures(group.images)
    if pictures.ndim == 3:
        one_channel = pictures[..., None]
        pictures = np.repeat(one_channel, 3, axis=-1)
    saliency = _to_array(maps)
    # A muted grey leaves the bright end of the scale to the map; the root makes weak regions visible, too.
    grey = 0.2 + 0.6 * pictures.mean(axis=-1, keepdims=True)
    opacity = 0.85 * np.sqrt(saliency)[..., None]
    # From 0.25 on: the colours below it are nearly black, as if the image were dark there.
    colours = colormaps["inferno"](0.25 + 0.65 * saliency)
    heat = colours[..., :3]  # without the opacity
    overlaid = (1 - opacity) * grey + opacity * heat
    count, height, width, _ = pictures.shape
    gap_width = max(1, width // 24)
    white_gap = np.ones((count, height, gap_width, 3))
    pairs = np.concatenate([pictures, white_gap, overlaid], axis=2)
    cell = 3.0
    block = _to_block(group, pairs, cell)
    _draw_grid([block], path, columns=3, cell=cell)


@dataclass(frozen=True)
class _Block:
    """Pictures as `_to_pictures` returns them, all under one heading, each under a title in a colour."""

    heading: str
    pictures: Floats
    titles: Sequence[str]
    colours: Sequence[str]


def _to_block(group: PredictionGroup, pictures: Floats, cell: float) -> _Block:
    """The group's `pictures` with titles: blue where the model is right, vermilion where it is wrong."""
    room = fitting_characters(cell)
    titles = []
    colours = []
    for predicted, confidence, true in zip(
        group.predicted, group.confidence, group.true, strict=True
    ):
        percent = f" · {100 * confidence:.0f} %"
        first_line = shorten(predicted, room - len(percent)) + percent
        second_line = shorten(f"true: {true}", room)
        titles.append(f"{first_line}\n{second_line}")
        colours.append(BLUE if predicted == true else VERMILION)
    return _Block(group.heading, pictures, titles, colours)


def _draw_grid(
    blocks: Sequence[_Block], path: Path, *, columns: int, cell: float
) -> None:
    """Draw each picture in a square of `cell` inches below its centred title, one block below the other."""
    width = columns * (cell + GAP) + GAP
    height = GAP
    # One pair of axes, in inches, holds all pictures and titles: each is placed exactly, whatever its size.
    figure = new_figure(width, 1)  # the height is known once all blocks are drawn
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    for block in blocks:
        height = _draw_block(axes, block, height, columns, cell)
    figure.set_size_inches(width, height)
    axes.set(xlim=(0, width), ylim=(height, 0))  # in inches, from the top left
    write(figure, path)


def _draw_block(
    axes: Axes, block: _Block, start: float, columns: int, cell: float
) -> float:
    """Draw a block from `start` inches below the top; returns where it ends."""
    if block.heading:
        middle = start + HEADING / 2 - 0.04
        axes.text(
            GAP,
            middle,
            block.heading,
            va="center",
            fontsize=TITLE,
            color=INK,
            parse_math=False,
        )
        start += HEADING
    pixels_high = int(block.pictures.shape[1])
    pixels_wide = int(block.pictures.shape[2])
    width = cell * min(1, pixels_wide / pixels_high)
    height = cell * min(1, pixels_high / pixels_wide)
    title_lines = max(title.count("\n") + 1 for title in block.titles)
    # Points to inches, with the space between lines.
    title_height = title_lines * 1.4 * SMALL / 72
    row_height = title_height + height + GAP
    for i, picture in enumerate(block.pictures):
        row, column = divmod(i, columns)
        middle = GAP + column * (cell + GAP) + cell / 2
        top = start + row * row_height + title_height
        extent = (middle - width / 2, middle + width / 2, top + height, top)
        axes.imshow(
            picture,
            extent=extent,
            cmap="gray",
            vmin=0,
            vmax=1,
            aspect="auto",
            interpolation="auto",
        )
        title = axes.text(
            middle,
            top - 0.04,
            block.titles[i],
            color=block.colours[i],
            fontsize=SMALL,
            parse_math=False,
        )
        title.set(horizontalalignment="center", verticalalignment="bottom")
    rows = math.ceil(len(block.pictures) / columns)
    return start + rows * row_height


def _to_pictures(images: Tensor) -> Floats:
    """`(N, H, W, 3)` for images with three channels, else `(N, H, W)`, the first channel."""
    if images.shape[1] == 3:
        return _to_array(images.permute(0, 2, 3, 1))
    return _to_array(images[:, 0])


def _to_array(values: Tensor) -> Floats:
    """Values in [0, 1], NaN as 0."""
    on_host = values.detach().to("cpu", torch.float64)
    array: Floats = on_host.nan_to_num().clamp(0, 1).numpy()
    return array
