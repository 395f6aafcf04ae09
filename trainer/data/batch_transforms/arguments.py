"""Arguments that several batch transforms take, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

BRIGHTEST = 255  # of uint8


def check_probability(p: Any) -> None:
    """Raise `ValueError` for what is no probability."""
    if not _is_number(p) or not 0 <= p <= 1:
        raise ValueError(f"p must be from 0 to 1, not {p}")


def height_and_width(size: Any) -> tuple[int, int]:
    """Of `32` and of `[32, 48]`. Raises `ValueError` for anything else."""
    sides = size if isinstance(size, list | tuple) else [size, size]
    # Not isinstance, which takes a bool for an int.
    is_whole = all(type(side) is int and side >= 1 for side in sides)
    if len(sides) != 2 or not is_whole:
        raise ValueError(f"size is a side in pixels, or [height, width], not {size}")
    return sides[0], sides[1]


def interval(name: str, value: Any) -> tuple[float, float]:
    """`[low, high]`, both above 0. Raises `ValueError` for anything else."""
    is_list = isinstance(value, list | tuple)
    if not is_list or len(value) != 2 or not _are_numbers(value):
        raise ValueError(f"{name} is [low, high], not {value}")
    low, high = value
    if not 0 < low <= high:
        raise ValueError(f"{name} must have 0 < low ≤ high, not {value}")
    return float(low), float(high)


def check_color(name: str, value: Any) -> None:
    """Raise `ValueError` for what is neither a number nor a list of them."""
    values = _as_list(value)
    if not values or not _are_numbers(values):
        raise ValueError(f"{name} is a number, or one for each channel, not {value}")


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return list(value)
    return [value]


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(_is_number(value) for value in values)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int | float)


def color(value: float | list[float], images: Tensor) -> Tensor:
    """A value for all channels, or one for each, in the kind of `images` `(B, C, H, W)`: `(1, C or 1, 1, 1)`.

    Raises `ValueError` for one that the images cannot hold.
    """
    values = _as_list(value)
    for level in values:
        _check_level(level, images.dtype)
    channels = images.shape[1]
    if len(values) not in (1, channels):
        raise ValueError(f"{value} has not one value for each of {channels} channels")
    if len(values) == 1:
        return images.new_full((1, 1, 1, 1), values[0])
    # Filled in one by one: a tensor from a list would be copied to the device, and the host would wait.
    filled = images.new_empty((1, channels, 1, 1))
    for channel, level in enumerate(values):
        filled[:, channel] = level
    return filled


def _check_level(level: float, dtype: torch.dtype) -> None:
    is_whole = level == int(level)
    is_level = is_whole and 0 <= level <= BRIGHTEST
    if dtype == torch.uint8 and not is_level:
        raise ValueError(
            f"uint8 images have whole levels from 0 to {BRIGHTEST}, and {level} is none"
        )
