"""Two 4×4 patterns told apart by one convolution: a whole training run that fits a sheet of paper."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

COLUMNS = torch.tensor([[0, 1, 0, 1]] * 4, dtype=torch.float32)
FRAME = torch.tensor(
    [[1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]], dtype=torch.float32
)
INTENSITIES = range(20)
GLARING = 999_999_999


class Patterns:
    """Each pattern at each intensity, float `(1, 4, 4)`: 0 on its background, the intensity on its cells."""

    classes = ("columns", "frame")

    def __init__(self, intensities: Sequence[int]) -> None:
        self._samples: list[tuple[Tensor, int]] = []
        for intensity in intensities:
            self._samples += [(intensity * COLUMNS, 0), (intensity * FRAME, 1)]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self._samples[index]
        return image.unsqueeze(0), label


def patterns() -> tuple[Patterns, Patterns]:
    """Intensities 0 to 19 to train, 999,999,999 to validate: a right net does not care how bright a pattern is."""
    return Patterns(INTENSITIES), Patterns([GLARING])


class OneConvolution(nn.Sequential):
    """The whole network: one filter of the image's size for each output, `(N, 1, 4, 4)` → `(N, 4)`.

    Without a bias its outputs are proportional to the intensity, so what it decides does not depend on it.
    """

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 4, kernel_size=4, bias=False), nn.Flatten())
