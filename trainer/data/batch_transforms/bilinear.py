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
# A longer part takes so many taps that the others of its batch would be made of them, too.
LARGEST_OF_BATCH = 32  # rows or columns of a part for one of the result
# Taps are taken so many at once that an operation takes longer than its call.
AT_ONCE = 1 << 14  # values
# More of them share the values of a batch, and would find too few in an image.
MOST_THREADS = 4


def resize(
    images: Tensor | Sequence[Tensor], box: Sequence[Tensor], size: tuple[int, int]
) -> Tensor:
    """Of each image the part at top, left, height and width of `box`, int64 `(B,)` each: uint8 `(B, C, *size)`.

    `images` are uint8, `(B, C, H, W)` or a list of `(C, H, W)`.
    """
    top, left, height, width = box
    if _goes_one_by_one(images[0], height, width, size):
        return _resize_one_by_one(images, box, size)
    batch = images if isinstance(images, Tensor) else on_canvas(images)
    full_height, full_width = batch.shape[2:]
    rows = _Taps(top, height, size[0], full_height)
    columns = _Taps(left, width, size[1], full_width)
    turned = rows.of_batch(batch).transpose(2, 3).contiguous()
    return columns.of_batch(turned).transpose(2, 3).contiguous()


def _goes_one_by_one(
    image: Tensor, height: Tensor, width: Tensor, size: tuple[int, int]
) -> bool:
    if image.device.type != "cpu" or torch.get_num_threads() > MOST_THREADS:
        return False
    if len(image) * math.prod(size) >= LARGE:
        return True
    reduction = max(int(height.max()) / size[0], int(width.max()) / size[1])
    return reduction > LARGEST_OF_BATCH


def _resize_one_by_one(
    images: Tensor | Sequence[Tensor], box: Sequence[Tensor], size: tuple[int, int]
) -> Tensor:
    """The same with no work on what is beside a part, and with no more taps than the part needs."""
    top, left, height, width = box
    most_rows, most_columns = int(height.max()), int(width.max())
    rows = _Taps(top, height, size[0], most_rows)
    # The columns are cut off before they are resized, so a part begins at its first one.
    columns = _Taps(torch.zeros_like(left), width, size[1], most_columns)
    channels = len(images[0])
    result = images[0].new_empty((len(images), channels, *size))
    tops = top.tolist()
    sides = zip(left.tolist(), height.tolist(), width.tolist(), strict=True)
    for index, (first, part_height, part_width) in enumerate(sides):
        part = images[index][:, :, first : first + part_width]
        lower = part[:, tops[index] : tops[index] + 1]
        # Of a part of one row each row of the result is that one: it is made shorter once, and then repeated.
        if part_height > 1:
            lower = rows.of_one(part, index, part_height)
        # Rows are what taps are taken of, so for the columns the image is laid on its side.
        turned = lower.transpose(1, 2).contiguous()
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
        top = top.unsqueeze(1)
        height = height.unsqueeze(1)
        reach = 2 * height.clamp_min(size)
        places = torch.arange(size, device=top.device)
        center = (2 * places + 1) * height
        outside = center - reach - size
        last_outside = torch.div(outside, 2 * size, rounding_mode="floor")
        taps = torch.arange(self._count(most), device=top.device)
        row = last_outside + 1 + taps.view(-1, 1, 1)
        distance = ((2 * row + 1) * size - center).abs()
        is_inside = (row >= 0) & (row < height)
        shares = (reach - distance).clamp_min(0) * is_inside
        whole = shares.sum(0)
        half = whole // 2  # rounds to the nearest
        weights = ((shares << WEIGHT_BITS) + half) // whole
        # A row beside the part weighs nothing, and is read all the same: one is taken that exists.
        existing = row.clamp_min(0).minimum(height - 1)
        self._rows = existing + top  # int64 `(taps, B, size)`
        self._weights = weights.int().unsqueeze(-1)  # int32, and `(…, 1)`

    def _count(self, height: int) -> int:
        """How many taps may weigh something, for parts of up to `height` rows."""
        width = 2 * max(height, self._size)  # of the triangle, in rows × size
        return math.ceil(width / self._size)

    def of_batch(self, images: Tensor) -> Tensor:
        """uint8 `(B, C, H, W)` → `(B, C, size, W)`."""
        count, channels, full_height, width = images.shape
        # The rows of all images and channels are one list: a single look-up then serves the batch.
        lines = images.reshape(-1, width)
        planes = torch.arange(count * channels, device=images.device)
        first_lines = (planes * full_height).view(count, channels, 1)
        total: Tensor | None = None
        for rows, weights in zip(self._rows, self._weights, strict=True):
            positions = first_lines + rows.unsqueeze(1)
            taken = lines.index_select(0, positions.flatten())
            taken = taken.view(count, channels, self._size, width)
            total = _add(total, taken * weights.unsqueeze(1))
        return _rounded(total)

    def of_one(self, image: Tensor, index: int, height: int) -> Tensor:
        """uint8 `(C, H, W)`, the image of `index`, whose part has `height` rows → `(C, size, W)`."""
        count = self._count(height)
        channels, _, width = image.shape
        step = max(1, AT_ONCE // (channels * self._size * width))
        total: Tensor | None = None
        for first in range(0, count, step):
            taps = slice(first, min(first + step, count))
            rows, weights = self._rows[taps, index], self._weights[taps, index]
            taken = image.index_select(1, rows.flatten()).int()
            taken = taken.view(channels, len(rows), self._size, width).mul_(weights)
            # A sum over one of them would be a copy.
            part = taken[:, 0] if step == 1 else taken.sum(1, dtype=torch.int32)
            total = _add(total, part)
        return _rounded(total)


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def _rounded(total: Tensor | None) -> Tensor:
    """Weighted sums, int32, as bytes."""
    assert total is not None, "there are two taps at least"
    half = 1 << (WEIGHT_BITS - 1)
    levels = total.add_(half).bitwise_right_shift_(WEIGHT_BITS)
    # The weights of a pixel are each rounded, so they may add up to a little more than 1.
    return levels.clamp_(0, 255).byte()
