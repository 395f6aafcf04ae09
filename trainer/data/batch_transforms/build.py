"""`data.batch_transforms` → transforms of whole batches, by torchvision's names and arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from trainer.config.registry import build, resolve
from trainer.data.batch_transforms.base import KEY, BatchTransform, BatchTransforms
from trainer.data.batch_transforms.coloring import (
    ColorJitter,
    RandomErasing,
    RandomGrayscale,
)
from trainer.data.batch_transforms.moving import (
    RandomCrop,
    RandomHorizontalFlip,
    RandomVerticalFlip,
)
from trainer.data.batch_transforms.resizing import RandomResizedCrop, Resize
from trainer.errors import ConfigError, nearest

BATCH_TRANSFORMS: Mapping[str, type[BatchTransform]] = {
    "RandomHorizontalFlip": RandomHorizontalFlip,
    "RandomVerticalFlip": RandomVerticalFlip,
    "RandomCrop": RandomCrop,
    "RandomResizedCrop": RandomResizedCrop,
    "Resize": Resize,
    "RandomErasing": RandomErasing,
    "ColorJitter": ColorJitter,
    "RandomGrayscale": RandomGrayscale,
}
MIXING = ("MixUp", "CutMix")


def build_batch_transforms(
    items: list[dict[str, Any]], *, seed: int, purpose: str, device: torch.device
) -> BatchTransforms | None:
    """The transforms that the list describes; None for an empty list.

    A name is one of `BATCH_TRANSFORMS`, or an import path to a class of a `BatchTransform`. Raises `ConfigError` for
    anything else.
    """
    if not items:
        return None
    transforms = []
    names = []
    for index, item in enumerate(items):
        place = f"{KEY}[{index}]"
        transforms.append(_build(place, item))
        names.append(item["name"])
    return BatchTransforms(transforms, names, seed=seed, purpose=purpose, device=device)


def _build(place: str, item: Any) -> BatchTransform:
    if not isinstance(item, dict) or not isinstance(item.get("name"), str):
        raise ConfigError(
            f"{place}.name",
            f"is missing in {item}; write {{name: RandomCrop, size: 32, padding: 4}}",
        )
    arguments = dict(item)
    name = arguments.pop("name")
    transform: BatchTransform = build(place, _resolve(place, name), arguments)
    draws = getattr(transform, "draws", None)
    is_count = isinstance(draws, int) and not isinstance(draws, bool) and draws >= 0
    if not callable(transform) or not is_count:
        raise ConfigError(
            f"{place}.name",
            f"{name} gives a {type(transform).__name__}, and a batch transform is called with images and draws, and "
            f"says in `draws` how many numbers it needs for each sample; see docs/on-device.md",
        )
    return transform


def _resolve(place: str, name: str) -> Any:
    if "." in name:
        return resolve(place, name, {})
    if name in BATCH_TRANSFORMS:
        return BATCH_TRANSFORMS[name]
    if name in MIXING:
        raise ConfigError(f"{place}.name", f"{name} is not set here but by train.mix")
    raise ConfigError(
        f"{place}.name",
        f'"{name}" is not one of {", ".join(BATCH_TRANSFORMS)}, nor an import path'
        f"{nearest(name, BATCH_TRANSFORMS)}; others go into data.train_transforms, sample by sample",
    )
