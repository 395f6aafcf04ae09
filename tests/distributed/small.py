"""Small data, nets and configs that the distributed tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer import Config, Trainer

SAMPLES, CLASSES, IGNORED = 103, 4, -1


class Points:
    """`(6,)` points with labels, some of them ignored: a map-style data set."""

    classes = tuple("abcd")

    def __init__(self, samples: int = SAMPLES, ignored: bool = True) -> None:
        draw = torch.Generator().manual_seed(1)
        self.points = torch.randn(samples, 6, generator=draw, dtype=torch.float64)
        self.labels = torch.randint(CLASSES, (samples,), generator=draw)
        if ignored:
            self.labels[::5] = IGNORED

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.points[i], int(self.labels[i])


class Images(Points):
    """`(2, 5, 5)` images with labels."""

    def __init__(self, samples: int = SAMPLES) -> None:
        super().__init__(samples, ignored=False)
        self.points = torch.randn(
            samples,
            2,
            5,
            5,
            generator=torch.Generator().manual_seed(2),
            dtype=torch.float64,
        )


def mlp() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def conv_net(**batch_norm: Any) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4, **batch_norm),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(36, CLASSES),
    )


def config(directory: Path, **changes: Any) -> Config:
    """fp64, nothing drawn or uploaded; changes are dotted keys with `__` for the dot, None to leave one out."""
    tree: dict[str, Any] = {
        "run": {"dir": str(directory), "figures": False},
        "batch": {"size": 28},
        "loss": {},
        "optimizer": {"lr": 0.1, "momentum": 0.9},
        "schedule": {"name": "constant"},
        "train": {"precision": "fp64", "epochs": 2, "log_every": 1},
        "wandb": {"mode": "disabled"},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        tree.setdefault(section, {})[key] = value
        if value is None:
            del tree[section][key]
    return Config.from_dict(tree)


def fitted(settings: Config, model: nn.Module, **more: Any) -> Trainer:
    trainer = Trainer(settings, model=model, **more)
    trainer.fit()
    return trainer


def state(trainer: Trainer) -> dict[str, Tensor]:
    return {
        name: tensor.clone() for name, tensor in trainer.module.state_dict().items()
    }


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest |a - b| over all tensors, relative to the largest |b| of each."""
    assert a.keys() == b.keys()
    return max(
        float((a[k] - b[k]).abs().max() / b[k].abs().max().clamp(min=1e-300))
        for k in a
        if a[k].numel()
    )
