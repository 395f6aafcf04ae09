"""The data and the model that the pages in docs/from/ train: handwritten digits, and a small net with BatchNorm."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

# Of 1,797 images. 64 does not divide it, and the last window of four batches of 16 has two.
TRAINED = 1437


def _digits() -> tuple[TensorDataset, TensorDataset]:
    pixels, classes = load_digits(return_X_y=True)
    inputs = torch.tensor(pixels / 16, dtype=torch.float32)  # (N, 64), in [0, 1]
    targets = torch.tensor(classes)
    train = TensorDataset(inputs[:TRAINED], targets[:TRAINED])
    val = TensorDataset(inputs[TRAINED:], targets[TRAINED:])
    return train, val


train, val = _digits()


def net() -> nn.Sequential:
    """Digits `(N, 64)` → logits `(N, 10)`."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10)
    )
