"""An LSTM over sequences of many lengths."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Classifier(nn.Module):
    """The mean of an LSTM's outputs over each sequence's own steps, not over its padding, and a linear layer."""

    def __init__(self, num_classes: int, width: int = 32) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, width, batch_first=True)
        self.head = nn.Linear(width, num_classes)

    def forward(self, values: Tensor, lengths: Tensor) -> Tensor:
        """Values `(N, T, 1)` and lengths `(N,)` → scores `(N, num_classes)`."""
        # Padding comes after a sequence's own steps, so it changes none of their outputs.
        outputs, _ = self.lstm(values)
        steps = torch.arange(values.shape[1], device=values.device)
        is_own = (steps < lengths.unsqueeze(1)).unsqueeze(2)
        return self.head((outputs * is_own).sum(1) / lengths.unsqueeze(1))
