"""Parts of images, resized to one size, for whole batches: bilinear with antialiasing, in whole numbers.

Every weight and every sum is a whole number, so a pixel is the same on any device and in any batch. It differs from
torchvision's by at most 1 of 255 levels, as far as tests have seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.data.batch_transforms.arguments import height_and_width, interval
from trainer.data.batch_transforms.boxes import (
    DRAWS,
    BoxDraw,
    Sizes,
    middle_part,
    root_of_area,
)
from trainer.data.batch_transforms.several_sizes import (
    in_groups,
    numbers_on,
    on_canvas,
)

WEIGHT_BITS = 20  # 255 levels and 20 bits fit into an int32


class RandomResizedCrop:
    """A random part of each image, of `scale` of its area and with sides in `ratio`, resized to `size` pixels.

    Bilinear, with antialiasing. uint8 images alone, which may have several sizes.

    Args:
        size: of a side, or [height, width].
        scale: least and largest share of the image's area.
        ratio: least and largest width over height.
    """

    draws = DRAWS

    def __init__(
        self,
        size: int | list[int],
        scale: list[float] | tuple[float, float] = (0.08, 1.0),
        ratio: list[float] | tuple[float, float] = (3 / 4, 4 / 3),
    ) -> None:
        self._height, self._width = height_and_width(size)
        self._ratio = interval("ratio", ratio)
        self._boxes = BoxDraw(interval("scale", scale), self._ratio, inside=False)

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        require_bytes(images, type(self).__name__)
        height, width = images.shape[-2:]
        middle = middle_part(height, width, *self._ratio)
        sizes = Sizes(height, width, root_of_area(height, width))
        return self._crop(images, draws, sizes, middle)

    def of_several_sizes(self, images: Sequence[Tensor], draws: Tensor) -> Tensor:
        """The same of uint8 images `(C, H, W)`, each of a size of its own."""
        return in_groups(images, draws, self._crop_each)

    def _crop_each(self, images: Sequence[Tensor], draws: Tensor) -> Tensor:
        rows = []
        for image in images:
            height, width = image.shape[-2:]
            middle = middle_part(height, width, *self._ratio)
            rows.append((height, width, root_of_area(height, width), *middle))
        columns = numbers_on(draws.device, rows)
        sizes, middles = Sizes(*columns[:3]), columns[3:]
        return self._crop(on_canvas(images), draws, sizes, middles)

    def _crop(
        self, images: Tensor, draws: Tensor, sizes: Sizes, middle: Sequence[Any]
    ) -> Tensor:
        """A part of each image, resized. `middle` is what is taken where no box fits."""
        boxes = self._boxes(draws, sizes)
        top, left, height, width = (
            torch.where(boxes.fits, drawn, fixed)
            for drawn, fixed in zip(boxes[:4], middle, strict=True)
        )
        return _resize(images, (top, left, height, width), (self._height, self._width))


class Resize:
    """Each image resized to `size` pixels, whatever its own size and its ratio of sides.

    Bilinear, with antialiasing. uint8 images alone, which may have several sizes.

    Args:
        size: [height, width].
    """

    draws = 0

    def __init__(self, size: list[int]) -> None:
        if not isinstance(size, list | tuple):
            raise ValueError(
                f"size is [height, width], not {size}: a batch has images of one size"
            )
        self._height, self._width = height_and_width(size)

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        require_bytes(images, type(self).__name__)
        return self._resize_each(images.unbind(), draws)

    def of_several_sizes(self, images: Sequence[Tensor], draws: Tensor) -> Tensor:
        """The same of uint8 images `(C, H, W)`, each of a size of its own."""
        return in_groups(images, draws, self._resize_each)

    def _resize_each(self, images: Sequence[Tensor], draws: Tensor) -> Tensor:
        rows = [(0, 0, *image.shape[-2:]) for image in images]
        box = numbers_on(draws.device, rows)
        return _resize(on_canvas(images), box, (self._height, self._width))


def _resize(images: Tensor, box: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Of each image the part at top, left, height and width of `box`, int64 `(B,)` each, resized to `size`."""
    top, left, height, width = box
    images = resize_rows(images, top, height, size[0])
    columns = images.transpose(2, 3).contiguous()
    columns = resize_rows(columns, left, width, size[1])
    return columns.transpose(2, 3).contiguous()


def require_bytes(images: Tensor, name: str) -> None:
    """Raise `ValueError` for images that are not uint8."""
    if images.dtype != torch.uint8:
        dtype = str(images.dtype).removeprefix("torch.")
        raise ValueError(f"{name} is for uint8 images, not {dtype}")


def resize_rows(images: Tensor, top: Tensor, height: Tensor, size: int) -> Tensor:
    """Of each image `(B, C, H, W)` the rows from `top` on, `height` of them, resized to `size` rows.

    `top` and `height` are int64 `(B,)`.
    """
    count, channels, full_height, width = images.shape
    rows, weights = _taps(top, height, size, full_height)
    device = images.device
    planes = torch.arange(count * channels, device=device) * full_height
    planes = planes.view(count, channels, 1)
    lines = images.reshape(-1, width)
    total: Tensor | None = None
    for row, weight in zip(rows, weights, strict=True):
        taken = lines.index_select(0, (planes + row.unsqueeze(1)).flatten())
        taken = taken.view(count, channels, size, width)
        part = taken * weight.view(count, 1, size, 1)
        total = part if total is None else total.add_(part)
    assert total is not None
    half = 1 << (WEIGHT_BITS - 1)
    return total.add_(half).bitwise_right_shift_(WEIGHT_BITS).clamp_(0, 255).byte()


def _taps(
    top: Tensor, height: Tensor, size: int, full_height: int
) -> tuple[list[Tensor], list[Tensor]]:
    """The rows that each row of the result is made of, and the weight of each: int64 and int32 `(B, size)`.

    A triangle as wide as a row of the result, at least two rows of the image: with h rows, tap j of row i weighs
    max(0, 1 − |(j + ½) − (i + ½) · h / size| / max(h / size, 1)), here times 2 · max(h, size).
    """
    height = height.unsqueeze(1)
    reach = 2 * height.clamp_min(size)
    center = (2 * torch.arange(size, device=top.device) + 1) * height
    first = torch.div(center - reach - size, 2 * size, rounding_mode="floor") + 1
    most = math.ceil(2 * max(full_height, size) / size)
    positions, shares = [], []
    for tap in range(most):
        position = first + tap
        share = (reach - ((2 * position + 1) * size - center).abs()).clamp_min(0)
        is_inside = (position >= 0) & (position < height)
        positions.append(position.clamp_min(0).minimum(height - 1) + top.unsqueeze(1))
        shares.append(share * is_inside)
    whole = torch.stack(shares).sum(0)
    weights = []
    for share in shares:
        weight = ((share << WEIGHT_BITS) + whole // 2) // whole
        weights.append(weight.int())
    return positions, weights
