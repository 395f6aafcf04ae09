"""Images in a grid: a batch, a model's predictions, and what they rest on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

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
    fitting,
    new_figure,
    shorten,
    write,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_IMAGES = 64
GAP, HEADING = 0.12, 0.36  # inches between cells, and those that a heading takes


@dataclass(frozen=True)
class Predicted:
    """Images, float `(N, C, H, W)` in [0, 1]; what a model took each for, how sure it was (0 to 1), what it is."""

    heading: str
    images: Tensor
    predicted: Sequence[str]
    confidence: Sequence[float]
    true: Sequence[str]


def batch_grid(images: Tensor, labels: Sequence[str], path: Path) -> None:
    """Up to 64 images, float `(N, C, H, W)` in [0, 1], in a near-square grid, its label above each."""
    count = min(len(images), MOST_IMAGES)
    columns = math.ceil(math.sqrt(count))
    cell = min(max(1.1, 6 / columns), 2.0)
    titles = [shorten(label, fitting(cell)) for label in labels[:count]]
    _draw_grid([_Block("", _pictures(images[:count]), titles, [INK] * count)], path, columns=columns, cell=cell)


def predictions(groups: Sequence[Predicted], path: Path) -> None:
    """What a model took images for, one group below the other."""
    cell = 1.8
    _draw_grid([_block(group, _pictures(group.images), cell) for group in groups], path, columns=4, cell=cell)


def saliency(group: Predicted, maps: Tensor, path: Path) -> None:
    """Beside each image the same in grey, under its map `(N, H, W)` in [0, 1] of what the prediction rests on."""
    from matplotlib import colormaps

    pictures = _pictures(group.images)
    coloured = pictures if pictures.ndim == 4 else np.repeat(pictures[..., None], 3, axis=-1)
    heat = maps.detach().to("cpu", torch.float64).nan_to_num().clamp(0, 1).numpy()
    grey = 0.2 + 0.6 * coloured.mean(axis=-1, keepdims=True)
    share = 0.85 * np.sqrt(heat)[..., None]
    mapped = (1 - share) * grey + share * colormaps["inferno"](0.25 + 0.65 * heat)[..., :3]
    between = np.ones((*coloured.shape[:2], max(1, coloured.shape[2] // 24), 3))
    pairs = np.concatenate([coloured, between, mapped], axis=2)
    cell = 3.0
    _draw_grid([_block(group, pairs, cell)], path, columns=3, cell=cell)


class _Block(NamedTuple):
    """Pictures as `_pictures` gives them, all under one heading, each under a title in a colour."""

    heading: str
    pictures: Floats
    titles: Sequence[str]
    colours: Sequence[str]


def _block(group: Predicted, pictures: Floats, cell: float) -> _Block:
    """The group's `pictures`, told right from wrong: titles are blue where the model is right, else vermilion."""
    titles, colours = [], []
    for guess, share, truth in zip(group.predicted, group.confidence, group.true, strict=True):
        sure = f" · {100 * share:.0f} %"
        guessed = shorten(guess, fitting(cell) - len(sure)) + sure
        titles.append(f"{guessed}\n{shorten(f'true: {truth}', fitting(cell))}")
        colours.append(BLUE if guess == truth else VERMILION)
    return _Block(group.heading, pictures, titles, colours)


def _draw_grid(blocks: Sequence[_Block], path: Path, *, columns: int, cell: float) -> None:
    """Each picture in a square of `cell` inches, its title centred above it; one block below the other."""
    width, height = columns * (cell + GAP) + GAP, GAP
    figure = new_figure(width, 1)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    for block in blocks:
        height = _draw_block(axes, block, height, columns, cell)
    figure.set_size_inches(width, height)
    axes.set(xlim=(0, width), ylim=(height, 0))  # in inches, from the top left
    write(figure, path)


def _draw_block(axes: Axes, block: _Block, start: float, columns: int, cell: float) -> float:
    """Draw a block that starts `start` inches down; returns where it ends."""
    if block.heading:
        middle = start + HEADING / 2 - 0.04
        axes.text(GAP, middle, block.heading, va="center", fontsize=TITLE, color=INK, parse_math=False)
        start += HEADING
    high, wide = map(int, block.pictures.shape[1:3])
    across, down = cell * min(1, wide / high), cell * min(1, high / wide)
    title = 1.4 * SMALL / 72 * max(text.count("\n") + 1 for text in block.titles)
    for i, (picture, text, colour) in enumerate(zip(*block[1:], strict=True)):
        row, column = divmod(i, columns)
        middle = GAP + column * (cell + GAP) + cell / 2
        top = start + row * (title + down + GAP) + title
        extent = (middle - across / 2, middle + across / 2, top + down, top)
        axes.imshow(picture, extent=extent, cmap="gray", vmin=0, vmax=1, aspect="auto", interpolation="auto")
        axes.text(middle, top - 0.04, text, ha="center", va="bottom", fontsize=SMALL, color=colour, parse_math=False)
    return start + math.ceil(len(block.pictures) / columns) * (title + down + GAP)


def _pictures(images: Tensor) -> Floats:
    """`(N, H, W, 3)` for colour images, else `(N, H, W)`, the first channel."""
    held = images.detach().to("cpu", torch.float64).nan_to_num().clamp(0, 1)
    shown: Floats = (held.permute(0, 2, 3, 1) if held.shape[1] == 3 else held[:, 0]).numpy()
    return shown
