"""Parts of images, resized to one size, for whole batches: bilinear with antialiasing, in whole numbers.

Every weight and every sum is a whole number, so a pixel is the same on any device and in any batch. It differs from
torchvision's by at most 1 of 255 levels, as far as tests have seen.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer.data.batch_transforms.arguments import height_and_width, interval
from trainer.data.batch_transforms.boxes import DRAWS, BoxDraw, middle_part

WEIGHT_BITS = 20  # 255 levels and 20 bits fit into an int32


class RandomResizedCrop:
    """A random part of each image, of `scale` of its area and with sides in `ratio`, resized to `size` pixels.

    Bilinear, with antialiasing. uint8 images alone.

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
        boxes = self._boxes(draws, height, width)
        middle = middle_part(height, width, *self._ratio)
        top, left, box_height, box_width = (
            torch.where(boxes.fits, drawn, fixed)
            for drawn, fixed in zip(boxes[:4], middle, strict=True)
        )
        images = resize_rows(images, top, box_height, self._height)
        columns = images.transpose(2, 3).contiguous()
        columns = resize_rows(columns, left, box_width, self._width)
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
