"""Colours of whole batches, and erased boxes: every pixel stays in its place.

Colours are changed in whole numbers, so a pixel is the same on any device and in any batch. They differ from
torchvision's by a few of 255 levels: it rounds between its floating-point steps.
"""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor

from trainer.data.batch_transforms.arguments import (
    check_color,
    check_probability,
    color,
    interval,
)
from trainer.data.batch_transforms.boxes import DRAWS, BoxDraw, Sizes, root_of_area
from trainer.data.batch_transforms.hue import turn_hue, turns
from trainer.data.batch_transforms.resizing import require_bytes
from trainer.exact.counter_draws import below, between, happens

ONE = 1 << 16  # a factor of 1
HALF = ONE >> 1  # added before a shift, it rounds to the nearest
# Red, green and blue in a pixel's brightness (ITU-R BT.601), of `ONE`.
LUMA = (19595, 38470, 7471)
LARGEST_FACTOR = 16.0  # beyond it a product would not fit into an int32
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ORDER = 3  # the draw that says in which order they come

Amount = float | list[float] | tuple[float, float]


class ColorJitter:
    """Brightness, contrast, saturation and hue of each image, changed at random, in a random order. uint8 images alone.

    Args:
        brightness: factors from 1 - brightness to 1 + brightness, or from [low, high]
        contrast: the same, towards the image's mean grey
        saturation: the same, towards each pixel's grey
        hue: turned by -hue to hue of the circle of hues, or by [low, high]; at most 0.5
    """

    moves = False

    def __init__(
        self,
        brightness: Amount = 0,
        contrast: Amount = 0,
        saturation: Amount = 0,
        hue: Amount = 0,
    ) -> None:
        self._factors = [
            _factors("brightness", brightness),
            _factors("contrast", contrast),
            _factors("saturation", saturation),
        ]
        self._turns = turns(hue)
        self._turns_hue = self._turns != (0, 0)
        # Without a hue, the draws are those of the other three alone.
        kinds = HUE + 1 if self._turns_hue else HUE
        self.draws = kinds + 1
        self._orders = torch.tensor(list(permutations(range(kinds))))

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        require_bytes(images, type(self).__name__)
        factors = self._draw_factors(draws)
        if self._orders.device != draws.device:
            self._orders = self._orders.to(draws.device)
        order = below(draws[:, ORDER], len(self._orders))
        kinds = self._orders[order]
        pixels = images.int()
        for kind in kinds.unbind(1):
            pixels = self._change(pixels, _by_image(kind), factors)
        return pixels.byte()

    def _draw_factors(self, draws: Tensor) -> list[Tensor]:
        """A factor of each image for each kind of change, int32 `(B,)`; of the hue, its turn."""
        factors = []
        for index, (low, high) in enumerate(self._factors):
            factor = between(draws[:, index], low, high)
            factors.append(factor.int())
        if self._turns_hue:
            low, high = self._turns
            turn = between(draws[:, HUE + 1], low, high)
            factors.append(turn.int())
        return factors

    def _change(self, pixels: Tensor, kind: Tensor, factors: list[Tensor]) -> Tensor:
        """Each image blended with black, its mean grey or its own grey, or turned in its hue, as its `kind` says."""
        # Every image goes through every kind, and keeps its own: to sort them by kind, the host would have to wait.
        gray = _gray(pixels)
        mean = _mean(gray)
        black = torch.zeros_like(gray)
        other = torch.where(kind == SATURATION, gray, black)
        other = torch.where(kind == CONTRAST, mean, other)
        saturation = _by_image(factors[SATURATION])
        factor = torch.where(kind == SATURATION, saturation, 0)
        for each in (BRIGHTNESS, CONTRAST):
            factor_of_kind = _by_image(factors[each])
            factor = torch.where(kind == each, factor_of_kind, factor)
        blend = pixels * factor + other * (ONE - factor) + HALF
        blended = (blend >> 16).clamp_(0, 255)
        if not self._turns_hue:
            return blended
        turned = turn_hue(pixels, factors[HUE])
        return torch.where(kind == HUE, turned, blended)


class RandomGrayscale:
    """Grey instead of colour, for each image with probability `p`. uint8 images alone."""

    draws = 1
    moves = False

    def __init__(self, p: float = 0.1) -> None:
        check_probability(p)
        self._p = p

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        require_bytes(images, type(self).__name__)
        is_gray = _by_image(happens(draws, self._p))
        gray = _gray(images.int()).byte()
        return torch.where(is_gray, gray, images)


class RandomErasing:
    """A random box of each image takes one `value`, with probability `p` (Zhong et al., 2020).

    Args:
        p: share of the images that lose a box.
        scale: least and largest share of the image's area.
        ratio: least and largest height over width.
        value: what the box is filled with, before data.mean and data.std; one, or one for each channel.
    """

    draws = DRAWS + 1
    moves = False

    def __init__(
        self,
        p: float = 0.5,
        scale: list[float] | tuple[float, float] = (0.02, 0.33),
        ratio: list[float] | tuple[float, float] = (0.3, 3.3),
        value: float | list[float] = 0,
    ) -> None:
        check_probability(p)
        check_color("value", value)
        area = interval("scale", scale)
        if area[1] > 1:
            raise ValueError(f"scale is of the image's area, up to 1, not {scale}")
        self._p = p
        self._value = value
        # A range that is the same of height over width, and the draw is symmetric in its logarithm.
        low, high = interval("ratio", ratio)
        self._boxes = BoxDraw(area, (1 / high, 1 / low), inside=True)

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        sizes = Sizes(height, width, root_of_area(height, width))
        box_draws, happens_draw = draws[:, :-1], draws[:, -1]
        boxes = self._boxes(box_draws, sizes)
        is_erased = boxes.fits & happens(happens_draw, self._p)
        rows = _inside(boxes.top, boxes.height, height)
        rows &= is_erased.unsqueeze(1)
        columns = _inside(boxes.left, boxes.width, width)
        area = rows[:, None, :, None] & columns[:, None, None, :]
        value = color(self._value, images)
        return torch.where(area, value, images)


def _factors(name: str, amount: Amount) -> tuple[int, int]:
    """The least and the largest factor, of `ONE`."""
    if isinstance(amount, int | float):
        if not 0 <= amount < LARGEST_FACTOR:
            raise ValueError(
                f"{name} must be from 0 to {LARGEST_FACTOR - 1:g}, not {amount}"
            )
        low = max(0.0, 1.0 - amount)
        high = 1.0 + amount
    else:
        low, high = amount
        if not 0 <= low <= high <= LARGEST_FACTOR:
            raise ValueError(
                f"{name} must have 0 ≤ low ≤ high ≤ {LARGEST_FACTOR:g}, not {amount}"
            )
    return round(low * ONE), round(high * ONE)


def _by_image(values: Tensor) -> Tensor:
    """`(B,)` as `(B, 1, 1, 1)`."""
    return values.view(-1, 1, 1, 1)


def _gray(pixels: Tensor) -> Tensor:
    """The brightness of each pixel, int32 `(B, 1, H, W)`, of one or three channels."""
    channels = pixels.shape[1]
    if channels == 1:
        return pixels
    if channels != len(LUMA):
        raise ValueError(f"colours are of images with 1 or 3 channels, not {channels}")
    red, green, blue = torch.split(pixels, 1, dim=1)
    of_red, of_green, of_blue = LUMA
    weighted = red * of_red + green * of_green + blue * of_blue
    return (weighted + HALF) >> 16


def _mean(gray: Tensor) -> Tensor:
    """The mean brightness of each image, rounded: `(B, 1, 1, 1)`."""
    area = gray.shape[-2] * gray.shape[-1]
    total = gray.sum((2, 3), keepdim=True)
    return torch.div(total + area // 2, area, rounding_mode="floor").int()


def _inside(start: Tensor, length: Tensor, size: int) -> Tensor:
    """Which of `size` places are in `[start, start + length)`: bool `(B, size)`."""
    places = torch.arange(size, device=start.device)
    start = start.unsqueeze(1)
    end = start + length.unsqueeze(1)
    return (places >= start) & (places < end)
