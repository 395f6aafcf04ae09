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
DISTINCT = 512


def settings(directory: Path, **changes: Any) -> Config:
    """A short run, quiet. Changes are dotted keys with `__` for the dot; None removes a key."""
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
        if value is None:
            del tree[section][key]
    return Config.from_dict(tree)


def fitted(
    config: Config, make_model: Callable[[], nn.Module], data: ImageArrays
) -> Trainer:
    torch.manual_seed(0)
    trainer = Trainer(config, model=make_model(), train_data=data)
    trainer.fit()
    return trainer


def first_digits(samples: int) -> ImageArrays:
    train = digits().train
    return ImageArrays(*train.batch(torch.arange(samples)))  # type: ignore[attr-defined]


def patterns(samples: int) -> ImageArrays:
    """Images of 8 × 8 pixels that a small net learns within seconds: a pattern for each of 10 classes, under noise."""
    draw = torch.Generator().manual_seed(0)
    shape = (1, 8, 8)
    of_class = torch.randint(256, (10, *shape), generator=draw)
    of_sample = torch.randint(256, (samples, *shape), generator=draw)
    targets = torch.arange(samples) % 10
    images = (of_class[targets] + of_sample) // 2
    return ImageArrays(images.byte(), targets)


def noise(samples: int, side: int, classes: int = 10) -> ImageArrays:
    """Images of `side` × `side` pixels, of no meaning; at most `DISTINCT` of them differ, for drawing takes seconds."""
    draw = torch.Generator().manual_seed(0)  # every process must have the same
    distinct = min(samples, DISTINCT)
    shape = (distinct, 3, side, side)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=draw)
    ids = torch.arange(samples) % distinct
    targets = torch.randint(classes, (samples,), generator=draw)
    return ImageArrays(images[ids], targets)
