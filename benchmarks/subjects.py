"""What the GPU checks train: short, quiet runs on little data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer import Config, Trainer
from trainer.data.datasets import ImageArrays, digits

SGD = {"lr": 0.02, "momentum": 0.9}


def settings(directory: Path, **changes: Any) -> Config:
    """A short run, quiet. Changes are dotted keys with `__` for the dot."""
    tree: dict[str, Any] = {
        "run": {"dir": str(directory), "figures": False},
        "batch": {"size": 64},
        "optimizer": dict(SGD),
        "schedule": {"name": "constant"},
        "train": {"epochs": 1},
        "best": {"metric": "train/loss"},
        "wandb": {"mode": "disabled"},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        tree.setdefault(section, {})[key] = value
    return Config.from_dict(tree)


def fitted(
    config: Config, make_model: Callable[[], nn.Module], data: ImageArrays
) -> Trainer:
    torch.manual_seed(0)
    trainer = Trainer(config, model=make_model(), train_data=data)
    trainer.fit()
    return trainer


def resnet18() -> nn.Module:
    from torchvision.models import resnet18

    model: nn.Module = resnet18(num_classes=10)
    return model


def first_digits(samples: int) -> ImageArrays:
    train = digits().train
    return ImageArrays(*train.batch(torch.arange(samples)))  # type: ignore[attr-defined]


def noise(samples: int, side: int) -> ImageArrays:
    """Images of `side` × `side` pixels, of no meaning."""
    images = torch.randint(256, (samples, 3, side, side), dtype=torch.uint8)
    return ImageArrays(images, torch.randint(10, (samples,)))
