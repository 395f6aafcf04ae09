"""Images of several sizes as a batch: each lies in the corner of a canvas that is as large as the largest.

What is beside an image on its canvas is never looked at, so an image gives the same in any company.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

MOST_BYTES = 1 << 27  # of the canvases that are worked on at once


def in_groups(
    images: Sequence[Tensor],
    draws: Tensor,
    change: Callable[[Sequence[Tensor], Tensor], Tensor],
) -> Tensor:
    """What `change` makes of images `(C, H, W)` and draws `(B, count)`, a few of them at once: `(B, C, H', W')`."""
    parts = []
    for first, end in _groups(images):
        parts.append(change(images[first:end], draws[first:end]))
    return torch.cat(parts)


def _groups(images: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Neighbouring images whose canvases take up to `MOST_BYTES`, but at least one."""
    groups = []
    first = 0
    channels, height, width = images[0].shape
    for index, image in enumerate(images):
        height = max(height, image.shape[1])
        width = max(width, image.shape[2])
        canvas = channels * height * width
        count = index + 1 - first
        if count * canvas > MOST_BYTES and index > first:
            groups.append((first, index))
            first = index
            _, height, width = image.shape
    return [*groups, (first, len(images))]


def on_canvas(images: Sequence[Tensor]) -> Tensor:
    """Images `(C, H, W)`, each at the top left of its canvas: `(B, C, height, width)`."""
    height = max(image.shape[1] for image in images)
    width = max(image.shape[2] for image in images)
    channels = images[0].shape[0]
    canvases = images[0].new_empty((len(images), channels, height, width))
    for canvas, image in zip(canvases, images, strict=True):
        _, image_height, image_width = image.shape
        canvas[:, :image_height, :image_width] = image
    return canvases


def numbers_on(
    device: torch.device, rows: Sequence[tuple[int, ...]]
) -> tuple[Tensor, ...]:
    """Each column of whole numbers, int64 `(B,)`, on the device. The host does not wait for it."""
    table = torch.tensor(rows)
    if device.type != "cpu":
        table = table.pin_memory().to(device, non_blocking=True)
    return table.unbind(1)
