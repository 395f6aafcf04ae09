"""The project's own data set."""

from __future__ import annotations

import torch
from torch import Tensor


class Discs:
    """Noisy images of discs on a sloping background, and which pixels belong to a disc.

    Any class with `__len__` and `__getitem__` will do. One with a parameter `train` (or `split`) is built twice, for
    training and for validation. The config's other keys under `data:` are its arguments.
    """

    def __init__(
        self, train: bool, samples: int = 800, side: int = 32, noise: float = 0.4
    ) -> None:
        # Its own generator: run.seed changes runs, not data.
        draw = torch.Generator().manual_seed(int(train))
        count = samples if train else samples // 4
        axis = torch.linspace(-1, 1, side)

        # Three discs in each image.
        centres = torch.rand(2, count, 3, 1, 1, generator=draw) * 2 - 1
        radii = 0.15 + 0.25 * torch.rand(count, 3, 1, 1, generator=draw)
        distance = torch.hypot(axis - centres[0], axis.unsqueeze(1) - centres[1])
        self.masks = (distance < radii).any(1).float()

        slope = torch.randn(count, 1, 1, generator=draw) * axis
        self.images = (
            self.masks + slope + noise * torch.randn(self.masks.shape, generator=draw)
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """An image, float `(1, side, side)`, and its mask of 0 and 1, of the same shape."""
        return self.images[index].unsqueeze(0), self.masks[index].unsqueeze(0)
