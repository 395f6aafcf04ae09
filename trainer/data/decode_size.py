"""`data.decode_short_side`, and what it must not be less than."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainer.config.schema import DataConfig
from trainer.errors import ConfigError


def check_decode_size(section: DataConfig) -> None:
    """Raise `ConfigError` if images could be decoded smaller than the transforms give them on.

    Looked at is every `size` of torchvision's transforms. Those of an import path are their author's.
    """
    side = section.decode_short_side
    if side is None:
        return
    lists = {
        "data.train_transforms": section.train_transforms,
        "data.val_transforms": section.val_transforms,
    }
    for key, transforms in lists.items():
        for place, size in sizes_of_transforms(key, transforms):
            if size > side:
                raise ConfigError(
                    "data.decode_short_side",
                    f"{side} is less than the {size} pixels of {place}, so images would be decoded only to be "
                    f"enlarged; set it to {size} or more",
                )
    if isinstance(section.short_side, int) and section.short_side > side:
        raise ConfigError(
            "data.decode_short_side",
            f"{side} is less than data.short_side={section.short_side}; set it to that or more",
        )


def sizes_of_transforms(key: str, transforms: Any) -> Iterator[tuple[str, int]]:
    """The key and the longest side of each `size` in a list of transforms, and in the lists within it."""
    if not isinstance(transforms, list):
        return
    for index, item in enumerate(transforms):
        if not isinstance(item, dict):
            continue
        place = f"{key}[{index}]"
        size = item.get("size")
        sides = size if isinstance(size, list) else [size]
        numbers = [side for side in sides if type(side) is int]
        if numbers and "." not in str(item.get("name")):
            yield f"{place}.size", max(numbers)
        yield from sizes_of_transforms(f"{place}.transforms", item.get("transforms"))
