"""The hue of whole batches, turned by an angle of each image's own, in whole numbers.

A colour's largest and smallest channel stay, and the three trade places around the circle of hues, as in the HSV model
(Smith, 1978). Hues are counted in sixths of the circle, 65,536 parts each.
"""

from __future__ import annotations

import torch
from torch import Tensor

SIXTH = 1 << 16
CIRCLE = 6 * SIXTH
HALF = SIXTH >> 1  # added before a shift, it rounds to the nearest
# Of the circle: a turn by half of it is the same in both directions.
LARGEST_SHARE = 0.5
# Where on the circle each of red, green and blue begins to fall, in sixths.
STARTS = (5, 3, 1)


def turns(hue: float | list[float] | tuple[float, float]) -> tuple[int, int]:
    """The least and the largest turn, of `SIXTH`: from -hue to hue, or from [low, high], shares of the circle.

    Raises `ValueError` for anything else.
    """
    if isinstance(hue, int | float):
        low, high = -hue, hue
    else:
        low, high = hue
    if not -LARGEST_SHARE <= low <= high <= LARGEST_SHARE:
        raise ValueError(
            f"hue is from 0 to {LARGEST_SHARE}, or [low, high] from {-LARGEST_SHARE} to {LARGEST_SHARE}, not {hue}"
        )
    return round(low * CIRCLE), round(high * CIRCLE)


def turn_hue(pixels: Tensor, turn: Tensor) -> Tensor:
    """Levels, int32 `(B, 3, H, W)`, with their hues turned by `turn`, int32 `(B,)`; grey images as they are."""
    if pixels.shape[1] == 1:
        return pixels
    largest = pixels.amax(1, keepdim=True)
    smallest = pixels.amin(1, keepdim=True)
    spread = largest - smallest
    turn_of_image = turn.view(-1, 1, 1, 1)
    hue = _hue(pixels, largest, spread) + turn_of_image
    channels = []
    for start in STARTS:
        position = torch.remainder(hue + start * SIXTH, CIRCLE)
        # How far the channel is from the largest, of `spread`: it rises, stays and falls around the circle.
        distance = torch.minimum(position, 4 * SIXTH - position).clamp_(0, SIXTH)
        below = (spread * distance + HALF) >> 16
        channels.append(largest - below)
    return torch.cat(channels, 1)


def _hue(pixels: Tensor, largest: Tensor, spread: Tensor) -> Tensor:
    """The hue of each pixel, int32 `(B, 1, H, W)`; of grey ones 0."""
    red, green, blue = torch.split(pixels, 1, dim=1)
    # Where two channels are the largest, the first of red, green and blue counts.
    is_red = largest == red
    is_green = largest == green
    difference = torch.where(is_green, blue - red, red - green)
    difference = torch.where(is_red, green - blue, difference)
    start = torch.where(is_green, 2 * SIXTH, 4 * SIXTH)
    start = torch.where(is_red, 0, start)
    divisor = spread.clamp_min(1)  # of a grey pixel, whose difference is 0
    part = torch.div(difference << 16, divisor, rounding_mode="floor")
    return part + start.int()
