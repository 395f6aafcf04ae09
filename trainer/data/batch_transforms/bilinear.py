"""Parts of images resized to one size: bilinear with antialiasing, in whole numbers.

Every weight and every sum is a whole number, so a pixel is the same on any device, in any batch, and whatever is done
at once. It differs from torchvision's by at most 1 of 255 levels, as far as tests have seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.data.batch_transforms.several_sizes import on_canvas

WEIGHT_BITS = 20  # 255 levels and 20 bits fit into an int32
# On the CPU, a batch of larger results leaves its caches between the passes over it, which are then better made image
# by image; of smaller ones, an operation takes less time than its call.
LARGE = 1 << 14  # values of a result
MOST_THREADS = (
    4  # more of them share the values of a batch, and would find too few in an image
)


def resize(
    images: Tensor | Sequence[Tensor], box: Sequence[Tensor], size: tuple[int, int]
) -> Tensor:
    """Of each image the part at top, left, height and width of `box`, int64 `(B,)` each: uint8 `(B, C, *size)`.

    `images` are uint8, `(B, C, H, W)` or a list of `(C, H, W)`.
    """
    if _goes_one_by_one(images[0], size):
        return _resize_one_by_one(images, box, size)
    batch = images if isinstance(images, Tensor) else on_canvas(images)
    top, left, height, width = box
    full_height, full_width = batch.shape[2:]
    rows = _Taps(top, height, size[0], full_height)
    columns = _Taps(left, width, size[1], full_width)
    turned = rows.of_batch(batch).transpose(2, 3).contiguous()
    return columns.of_batch(turned).transpose(2, 3).contiguous()


def _goes_one_by_one(image: Tensor, size: tuple[int, int]) -> bool:
    if image.device.type != "cpu" or torch.get_num_threads() > MOST_THREADS:
        return False
    return len(image) * math.prod(size) >= LARGE


def _resize_one_by_one(
    images: Tensor | Sequence[Tensor], box: Sequence[Tensor], size: tuple[int, int]
) -> Tensor:
    """The same with no work on what is beside a part, and with no more taps than the part needs."""
    top, left, height, width = box
    rows = _Taps(top, height, size[0], int(height.max()))
    columns = _Taps(torch.zeros_like(left), width, size[1], int(width.max()))
    result = images[0].new_empty((len(images), len(images[0]), *size))
    sides = zip(left.tolist(), height.tolist(), width.tolist(), strict=True)
    for index, (first, part_height, part_width) in enumerate(sides):
        part = images[index][:, :, first : first + part_width]
        turned = rows.of_one(part, index, part_height).transpose(1, 2).contiguous()
        resized = columns.of_one(turned, index, part_width)
        result[index] = resized.transpose(1, 2)
    return result


class _Taps:
    """The rows that each row of a result is made of, and the weight of each.

    A triangle as wide as a row of the result, at least two rows of the image: with h rows, tap j of row i weighs
    max(0, 1 − |(j + ½) − (i + ½) · h / size| / max(h / size, 1)), here times 2 · max(h, size).
    """

    def __init__(self, top: Tensor, height: Tensor, size: int, most: int) -> None:
        """Of images with parts from row `top` on, of `height` rows, int64 `(B,)` each, at `most` so many."""
        self._size = size
        height = height.unsqueeze(1)
        reach = 2 * height.clamp_min(size)
        center = (2 * torch.arange(size, device=top.device) + 1) * height
        first = torch.div(center - reach - size, 2 * size, rounding_mode="floor") + 1
        rows, shares = [], []
        for tap in range(self._count(most)):
            row = first + tap
            share = (reach - ((2 * row + 1) * size - center).abs()).clamp_min(0)
            is_inside = (row >= 0) & (row < height)
            rows.append(row.clamp_min(0).minimum(height - 1) + top.unsqueeze(1))
            shares.append(share * is_inside)
        whole = torch.stack(shares).sum(0)
        weights = []
        for share in shares:
            weight = ((share << WEIGHT_BITS) + whole // 2) // whole
            weights.append(weight.int())
        self._rows = torch.stack(rows)  # int64 `(taps, B, size)`
        self._weights = torch.stack(weights).unsqueeze(-1)  # int32, and `(…, 1)`

    def _count(self, height: int) -> int:
        """How many taps may weigh something, for parts of up to `height` rows."""
        return math.ceil(2 * max(height, self._size) / self._size)

    def of_batch(self, images: Tensor) -> Tensor:
        """uint8 `(B, C, H, W)` → `(B, C, size, W)`."""
        count, channels, full_height, width = images.shape
        planes = torch.arange(count * channels, device=images.device) * full_height
        planes = planes.view(count, channels, 1)
        lines = images.reshape(-1, width)
        total: Tensor | None = None
        for rows, weights in zip(self._rows, self._weights, strict=True):
            taken = lines.index_select(0, (planes + rows.unsqueeze(1)).flatten())
            taken = taken.view(count, channels, self._size, width)
            total = _add(total, taken * weights.unsqueeze(1))
        return _rounded(total)

    def of_one(self, image: Tensor, index: int, height: int) -> Tensor:
        """uint8 `(C, H, W)`, the image of `index`, whose part has `height` rows → `(C, size, W)`."""
        taps = slice(self._count(height))
        total: Tensor | None = None
        for rows, weights in zip(
            self._rows[taps, index], self._weights[taps, index], strict=True
        ):
            taken = image.index_select(1, rows).int()
            total = _add(total, taken.mul_(weights))
        return _rounded(total)


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def _rounded(total: Tensor | None) -> Tensor:
    """Weighted sums, int32, as bytes."""
    assert total is not None, "there are two taps at least"
    half = 1 << (WEIGHT_BITS - 1)
    return total.add_(half).bitwise_right_shift_(WEIGHT_BITS).clamp_(0, 255).byte()
