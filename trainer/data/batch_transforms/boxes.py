"""Random boxes within images, of a share of the area and with a ratio of sides, in whole numbers throughout.

Roots and exponentials differ in their last digits between devices, and a box must not. So they are taken once, on the
host, into tables of whole numbers that a draw chooses from: `STEPS` areas and as many ratios.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.exact.counter_draws import below

STEPS = 4096  # areas, and ratios, in a table
ATTEMPTS = 10  # as many as torchvision makes
DRAWS = 2 * ATTEMPTS + 2  # an area and a ratio for each attempt, then top and left
ONE = 1 << 16  # a table's 1
ROOT_BITS = 8  # fraction of the root of an image's area


class Boxes(NamedTuple):
    """A box in each image, int64 `(B,)` each."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    fits: Tensor  # bool `(B,)`: False where no attempt gave one that fits; the box is then of no use


class Sizes(NamedTuple):
    """Height and width of images, and the root of their area: numbers for all alike, or int64 `(B,)` for each."""

    height: int | Tensor
    width: int | Tensor
    root: int | Tensor  # see `root_of_area`


def root_of_area(height: int, width: int) -> int:
    """The root of an image's area, in parts of `1 << ROOT_BITS`."""
    return round(math.sqrt(height * width) * (1 << ROOT_BITS))


class BoxDraw:
    """Boxes of `scale` of an image's area, whose width over height is within `ratio`, as torchvision draws them.

    Areas are uniform, ratios uniform in their logarithm. The first of ten attempts that fits into the image counts.
    """

    def __init__(
        self, scale: tuple[float, float], ratio: tuple[float, float], *, inside: bool
    ) -> None:
        """With `inside`, a box that is as high or as wide as its image does not fit."""
        self._largest = -1 if inside else 0
        roots = []
        for area in _midpoints(*scale):
            root = math.sqrt(area)
            roots.append(round(root * ONE))
        lowest, highest = ratio
        wider, higher = [], []
        for logarithm in _midpoints(math.log(lowest), math.log(highest)):
            # Half of it for each side: their product is the area, whatever the ratio.
            factor_of_width = math.exp(logarithm / 2)
            factor_of_height = math.exp(-logarithm / 2)
            wider.append(round(factor_of_width * ONE))
            higher.append(round(factor_of_height * ONE))
        self._tables = [
            torch.tensor(roots),
            torch.tensor(wider),
            torch.tensor(higher),
        ]

    def __call__(self, draws: Tensor, sizes: Sizes) -> Boxes:
        """Boxes in images of some sizes, from int64 `(B, DRAWS)`."""
        roots, wider, higher = self._tables_on(draws.device)
        area_draws = draws[:, :ATTEMPTS]
        ratio_draws = draws[:, ATTEMPTS : 2 * ATTEMPTS]
        top_draw, left_draw = draws[:, -2], draws[:, -1]
        # Every attempt of every image at once: which one fits is never asked on the host, which would have to wait.
        area = roots[below(area_draws, STEPS)]
        ratio = below(ratio_draws, STEPS)
        height, width, root = sizes
        root = _by_row(root)
        widths = _scaled(area, wider[ratio], root)
        heights = _scaled(area, higher[ratio], root)
        fits = (widths >= 1) & (widths <= _by_row(width) + self._largest)
        fits &= (heights >= 1) & (heights <= _by_row(height) + self._largest)
        # The first of equal ones.
        first = fits.long().argmax(1, keepdim=True)
        box_height = heights.gather(1, first).squeeze(1)
        box_width = widths.gather(1, first).squeeze(1)
        # At least one place: a box that does not fit is drawn, too.
        tops = (height - box_height + 1).clamp_min(1)
        lefts = (width - box_width + 1).clamp_min(1)
        return Boxes(
            below(top_draw, tops),
            below(left_draw, lefts),
            box_height,
            box_width,
            fits.any(1),
        )

    def _tables_on(self, device: torch.device) -> list[Tensor]:
        if self._tables[0].device != device:
            self._tables = [table.to(device) for table in self._tables]
        return self._tables


def middle_part(
    height: int, width: int, low: float, high: float
) -> tuple[int, int, int, int]:
    """Top, left, height and width of an image's largest part of a ratio from `low` to `high`, in its middle.

    What torchvision's RandomResizedCrop takes where no attempt fits. It has a pixel at least: of an image one pixel
    wide no part is three times as wide as high, say.
    """
    part_height, part_width = height, width
    if width / height < low:
        part_height = max(1, round(width / low))
    elif width / height > high:
        part_width = max(1, round(height * high))
    top = (height - part_height) // 2
    left = (width - part_width) // 2
    return top, left, part_height, part_width


def _midpoints(low: float, high: float) -> list[float]:
    """`STEPS` numbers evenly between two, each in the middle of its part."""
    span = high - low
    return [low + span * (step + 0.5) / STEPS for step in range(STEPS)]


def _by_row(value: int | Tensor) -> int | Tensor:
    """A number of each image as a column, beside its attempts."""
    return value.unsqueeze(1) if isinstance(value, Tensor) else value


def _scaled(area: Tensor, ratio: Tensor, root: int | Tensor) -> Tensor:
    """`area · ratio · root`, of the roots of the first two, rounded to whole pixels."""
    side_of_square = (area * ratio) >> 16
    product = side_of_square * root
    bits = 16 + ROOT_BITS
    half = 1 << (bits - 1)
    return (product + half) >> bits
