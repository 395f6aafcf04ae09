"""Where is the spot? Two coordinates from an image, by a network after LeNet-5 (LeCun et al., 1998)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SIDE = 28  # pixels
WIDTH = 2.5  # of the spot, in pixels
NOISE = 0.1  # of the spot's brightness


class Spots:
    """Float `(1, 28, 28)` images of one soft spot in noise; the target is its place `(x, y)`, each in [-1, 1]."""

    def __init__(self, samples: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.places = torch.rand(samples, 2, generator=draw) * 2 - 1
        axis = torch.linspace(-1.2, 1.2, SIDE)
        width = 2.4 * WIDTH / SIDE  # in the units of the axis
        across = (axis - self.places[:, :1]) / width
        down = (axis - self.places[:, 1:]) / width
        spots = torch.exp(-(down.unsqueeze(2) ** 2 + across.unsqueeze(1) ** 2) / 2)
        self.images = (
            spots + NOISE * torch.randn(spots.shape, generator=draw)
        ).unsqueeze(1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.places[index]


def spots(samples: int = 2000, val_samples: int = 400) -> tuple[Spots, Spots]:
    return Spots(samples, seed=1), Spots(val_samples, seed=2)


class LeNet(nn.Sequential):
    """`(N, 1, 28, 28)` → `(N, outputs)`: two convolutions with pooling, three linear layers."""

    def __init__(self, outputs: int = 2) -> None:
        super().__init__(
            nn.Conv2d(1, 6, 5, padding=2),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(400, 120),
            nn.Tanh(),
            nn.Linear(120, 84),
            nn.Tanh(),
            nn.Linear(84, outputs),
        )
