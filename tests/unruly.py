"""Models, losses and data sets that break the promise, each in one way, and some that only look as if they did."""

from __future__ import annotations

import random
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from tests.distributed.small import CLASSES, Images, Points
from trainer import Task, WeightedSum


class Net(nn.Module):
    """Two layers, and between them what a subclass does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(6, 8)
        self.last = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(torch.tanh(self.first(x))))

    def between(self, hidden: Tensor) -> Tensor:
        return hidden


# ---------------------------------------------------------------- right


class Dropout(Net):
    def between(self, hidden: Tensor) -> Tensor:
        return F.dropout(hidden, 0.5, self.training)


class LayerDropByTorch(Net):
    def between(self, hidden: Tensor) -> Tensor:
        return 2 * hidden if torch.rand(1).item() < 0.5 else hidden


class DrawsFromNumPy(Net):
    def between(self, hidden: Tensor) -> Tensor:
        return hidden * np.random.rand()


class DrawsFromPython(Net):
    def between(self, hidden: Tensor) -> Tensor:
        return hidden * random.random()


class LayerDropLater(Net):
    """Draws from the second training pass over 103 samples in micro-batches of 7 on, whoever runs them."""

    def __init__(self) -> None:
        super().__init__()
        self.begin = False

    def between(self, hidden: Tensor) -> Tensor:
        return hidden * random.random() if self.begin else hidden


class Residual(nn.Module):
    """Convolutions with BatchNorm, a shortcut and dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.block = nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Dropout2d()
        )
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.stem(x)).relu()
        hidden = (hidden + self.block(hidden)).relu()
        return self.head(hidden.mean((2, 3)))


class Recurrent(nn.Module):
    """An LSTM over three points of two coordinates."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.lstm = nn.LSTM(2, 5, num_layers=2, dropout=0.2, batch_first=True)
        self.last = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.lstm(x.view(len(x), 3, 2))
        return self.last(hidden[:, -1])


# ---------------------------------------------------------------- another result each time


class Noise(nn.Module):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(1)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.rng.random()


class NoisyLayer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.noise = Noise()

    def between(self, hidden: Tensor) -> Tensor:
        return self.noise(hidden)


class OwnGenerator(Net):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)

    def between(self, hidden: Tensor) -> Tensor:
        return hidden + torch.rand(8, generator=self.generator, dtype=hidden.dtype)


class Clock(Net):
    def between(self, hidden: Tensor) -> Tensor:
        # Of so many numbers that two forwards hardly ever find the same.
        return hidden * (1 + time.perf_counter_ns() % 1_000_003)


class NoisyLoss(Task):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)

    def loss_sum(self, output: Tensor, targets: Tensor) -> WeightedSum:
        losses = F.cross_entropy(output, targets, reduction="none")
        weights = torch.rand(len(targets), generator=self.generator)
        return WeightedSum((losses * weights).sum(), len(targets))


# ---------------------------------------------------------------- something kept from micro-batch to micro-batch


class MemoryBank(Net):
    def __init__(self) -> None:
        super().__init__()
        self.bank: list[Tensor] = []

    def between(self, hidden: Tensor) -> Tensor:
        result = hidden + self.bank[-1] if self.bank else hidden
        self.bank.append(hidden.detach().mean(0))
        return result


class RunningMean(Net):
    """A running mean kept by hand, in an attribute that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(8, dtype=torch.float64)

    def between(self, hidden: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * hidden.detach().mean(0)
        return hidden - self.mean


class Teacher(Net):
    """A frozen layer that follows a trained one in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(6, 8).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for follower, leader in zip(
                self.teacher.parameters(), self.first.parameters(), strict=True
            ):
                follower.mul_(0.9).add_(0.1 * leader)
        return self.last(torch.tanh(self.first(x)) + self.teacher(x))


class CarriedState(Recurrent):
    """An LSTM that goes on from where the last micro-batch has left it."""

    state: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        hidden, (h, c) = self.lstm(x.view(len(x), 3, 2), self.state)
        self.state = h.detach(), c.detach()
        return self.last(hidden[:, -1])


# ---------------------------------------------------------------- losses


class GrowingTemperature(Task):
    """Its own parameter alone is trained by what earlier micro-batches have left."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))
        self.calls = [0]

    def loss_sum(self, output: Tensor, targets: Tensor) -> WeightedSum:
        self.calls[0] += 1
        total = F.cross_entropy(output, targets, reduction="sum")
        return WeightedSum(total + self.bias * self.calls[0], len(targets))


class InfiniteGradient(Task):
    """A finite loss whose gradient is not: the root of zero."""

    def loss_sum(self, output: Tensor, targets: Tensor) -> WeightedSum:
        total = F.cross_entropy(output, targets, reduction="sum")
        return WeightedSum(total + (output * 0).abs().sqrt().sum(), len(targets))


# ---------------------------------------------------------------- data


class OwnNoise(Images):
    """Adds noise from a generator of its own to an image."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(1)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image, label = super().__getitem__(i)
        return image + self.rng.random(), label


class GlobalNoise(Images):
    """Adds noise from the global generators, which are seeded for each sample."""

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image, label = super().__getitem__(i)
        return image + np.random.rand() + random.random() + torch.rand(1), label


class NoisyLabels(Points):
    """Labels from a generator of its own."""

    def __init__(self) -> None:
        super().__init__(ignored=False)
        self.rng = random.Random(1)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.points[i], self.rng.randrange(CLASSES)


class DiffersInWorkers(Points):
    """The same whenever a process asks, but another in a loader process."""

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        point, label = super().__getitem__(i)
        return point + (0 if get_worker_info() is None else 1), label


class LateNoise(Points):
    """Noise in the second half alone, where a second rank begins."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(1)
        self.noisy: set[int] = set()

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        point, label = super().__getitem__(i)
        return (point + self.rng.random() if i in self.noisy else point), label
