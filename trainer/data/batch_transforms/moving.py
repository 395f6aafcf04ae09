"""Flips and crops of whole batches: pixels move, and none is changed."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.data.batch_transforms.arguments import (
    check_color,
    check_probability,
    color,
    height_and_width,
)
from trainer.exact.counter_draws import below, happens


class RandomHorizontalFlip:
    """Left and right change places, for each image with probability `p`."""

    draws = 1
    dimension = 3

    def __init__(self, p: float = 0.5) -> None:
        check_probability(p)
        self._p = p

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        # Whole images are copied, which takes a fifth of the time of a choice for each pixel.
        both = torch.cat([images, images.flip(self.dimension)])
        count = len(images)
        is_flipped = happens(draws.squeeze(1), self._p)
        originals = torch.arange(count, device=images.device)
        rows = originals + is_flipped * count
        return both.index_select(0, rows)


class RandomVerticalFlip(RandomHorizontalFlip):
    """Top and bottom change places, for each image with probability `p`."""

    dimension = 2


class RandomCrop:
    """A part of `size` pixels at a random place of each image, after `padding` on every side.

    Args:
        size: of a side, or [height, width].
        padding: pixels added on every side.
        fill: the value of what is added, one or one for each channel; only with padding_mode constant.
        padding_mode: constant, edge (the border's pixels again) or reflect (mirrored, without the border's pixels).
    """

    draws = 2

    def __init__(
        self,
        size: int | list[int],
        padding: int = 0,
        fill: float | list[float] = 0,
        padding_mode: str = "constant",
    ) -> None:
        self._height, self._width = height_and_width(size)
        if type(padding) is not int or padding < 0:
            raise ValueError(
                f"padding is a number of pixels, 0 or more, for every side alike, not {padding}"
            )
        check_color("fill", fill)
        if padding_mode not in ("constant", "edge", "reflect"):
            raise ValueError(
                f"padding_mode is constant, edge or reflect, not {padding_mode}"
            )
        self._padding = padding
        self._fill = fill
        self._mode = padding_mode

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        images = self._padded(images)
        height, width = images.shape[-2:]
        if height < self._height or width < self._width:
            raise ValueError(
                f"images of {height} × {width} with their padding are smaller than {self._height} × {self._width}"
            )
        top = below(draws[:, 0], height - self._height + 1)
        left = below(draws[:, 1], width - self._width + 1)
        return windows(images, top, left, self._height, self._width)

    def _padded(self, images: Tensor) -> Tensor:
        padding = self._padding
        if not padding:
            return images
        count, channels, height, width = images.shape
        if self._mode == "constant":
            full_height = height + 2 * padding
            full_width = width + 2 * padding
            padded = images.new_empty((count, channels, full_height, full_width))
            padded.copy_(color(self._fill, images))
            padded[:, :, padding:-padding, padding:-padding] = images
            return padded
        if self._mode == "reflect" and padding >= min(height, width):
            raise ValueError(
                f"a reflection of {padding} pixels needs larger images than {height} × {width}"
            )
        for dimension, length in ((2, height), (3, width)):
            positions = self._positions(length, images.device)
            images = images.index_select(dimension, positions)
        return images

    def _positions(self, length: int, device: torch.device) -> Tensor:
        """Which row (or column) of `length` each one of the padded image is."""
        positions = torch.arange(-self._padding, length + self._padding, device=device)
        if self._mode == "edge":
            return positions.clamp(0, length - 1)
        positions = positions.abs()
        mirrored = 2 * (length - 1) - positions
        return torch.minimum(positions, mirrored)


def windows(
    images: Tensor, top: Tensor, left: Tensor, height: int, width: int
) -> Tensor:
    """Of each image `(B, C, H, W)` the part of one size whose corner is at `top` and `left`, int64 `(B,)`."""
    images = images.contiguous()
    count, channels, full_height, full_width = images.shape
    # Every run of `width` neighbouring values, as a view: a row of a part is one of them, and is copied as a whole.
    count_of_runs = images.numel() - width + 1
    runs = images.as_strided((count_of_runs, width), (1, 1))
    device = images.device
    area = full_height * full_width
    planes = torch.arange(count * channels, device=device) * area
    corner_in_plane = top * full_width + left
    corners = planes.view(count, channels) + corner_in_plane.unsqueeze(1)
    rows = torch.arange(height, device=device) * full_width
    starts = corners.unsqueeze(2) + rows
    parts = runs.index_select(0, starts.flatten())
    return parts.view(count, channels, height, width)
