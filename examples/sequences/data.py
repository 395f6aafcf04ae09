"""Noisy waves of three frequencies, each of its own length, and the function that makes a batch of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class Waves:
    """Sequences `(T, 1)` of 20 to 60 values, and which of the three frequencies each has."""

    classes = ("slow", "middle", "fast")
    periods = (24.0, 16.0, 11.0)  # in steps

    def __init__(self, train: bool, samples: int = 600, noise: float = 0.3) -> None:
        # Its own generator: run.seed changes runs, not data.
        draw = torch.Generator().manual_seed(int(train))
        count = samples if train else samples // 4
        self.targets = torch.randint(3, (count,), generator=draw).tolist()
        lengths = torch.randint(20, 61, (count,), generator=draw).tolist()
        self.values = []
        for target, length in zip(self.targets, lengths, strict=True):
            phase = 6.28 * torch.rand(1, generator=draw)
            angle = 6.28 * torch.arange(length) / self.periods[target] + phase
            noisy = angle.sin() + noise * torch.randn(length, generator=draw)
            self.values.append(noisy.unsqueeze(1))

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.values[index], self.targets[index]


def pad(samples: list[tuple[Tensor, int]]) -> tuple[dict[str, Tensor], Tensor]:
    """The batch of some samples: values `(N, T, 1)` padded to the longest, lengths `(N,)`, and classes `(N,)`.

    The inputs are a dict, whose keys are parameters of the model's forward.
    """
    values = [value for value, _ in samples]
    lengths = torch.tensor([len(value) for value in values])
    targets = torch.tensor([target for _, target in samples])
    padded = pad_sequence(values, batch_first=True)
    return {"values": padded, "lengths": lengths}, targets
