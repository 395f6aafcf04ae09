"""Adaptive average pooling that bitwise mode can run on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """`torch.nn.AdaptiveAvgPool2d`, with a deterministic backward where deterministic algorithms are asked for.

    CUDA has no deterministic kernel for the backward of torch's. The mean of each window by itself has one. Where they
    are not asked for, this is torch's own. It has no parameters, so a `state_dict` does not change.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not torch.are_deterministic_algorithms_enabled():
            return super().forward(x)
        height, width = self._output_shape(x)
        full_height, full_width = x.shape[-2:]
        if full_height % height == 0 and full_width % width == 0:
            window = (full_height // height, full_width // width)
            return nn.functional.avg_pool2d(x, window)
        rows = []
        for top, bottom in _windows(full_height, height):
            means = []
            for left, right in _windows(full_width, width):
                part = x[..., top:bottom, left:right]
                means.append(part.mean((-2, -1)))
            rows.append(torch.stack(means, -1))
        return torch.stack(rows, -2)

    def _output_shape(self, x: Tensor) -> tuple[int, int]:
        size = self.output_size
        height, width = size if isinstance(size, tuple | list) else (size, size)
        return height or x.shape[-2], width or x.shape[-1]  # None: as many as there are


def _windows(size: int, count: int) -> list[tuple[int, int]]:
    """Torch's windows: of equal size where `size` divides, overlapping where it does not."""
    return [
        (index * size // count, -(-(index + 1) * size // count))
        for index in range(count)
    ]
