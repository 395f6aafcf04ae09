"""Colours of whole batches, and erased boxes: every pixel stays in its place.

Colours are changed in whole numbers, so a pixel is the same on any device and in any batch. They differ from
torchvision's by a few of 255 levels: it rounds between its floating-point steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.data.batch_transforms.arguments import (
    check_color,
    check_probability,
    color,
    interval,
)
from trainer.data.batch_transforms.boxes import DRAWS, BoxDraw
from trainer.data.batch_transforms.resizing import require_bytes
from trainer.exact.counter_draws import between, happens

ONE = 1 << 16  # a factor of 1
HALF = ONE >> 1
# Red, green and blue in a pixel's brightness (ITU-R BT.601), of `ONE`.
LUMA = (19595, 38470, 7471)
LARGEST_FACTOR = 16.0  # beyond it a product would not fit into an int32
# The orders of three changes.
ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
BRIGHTNESS, CONTRAST, SATURATION = range(3)

Amount = float | list[float] | tuple[float, float]


class ColorJitter:
    """Brightness, contrast and saturation of each image times random factors, in a random order. uint8 images alone.

    Args:
        brightness: factors from 1 - brightness to 1 + brightness, or from [low, high]
        contrast: the same, towards the image's mean grey
        saturation: the same, towards each pixel's grey
        hue: 0: it is not changed here
    """

    draws = 4
    moves = False

    def __init__(
        self,
        brightness: Amount = 0,
        contrast: Amount = 0,
        saturation: Amount = 0,
        hue: float = 0,
    ) -> None:
        if hue:
            raise ValueError(
                "hue is not changed for whole batches; use ColorJitter in data.train_transforms"
            )
        self._factors = [
            _factors("brightness", brightness),
            _factors("contrast", contrast),
            _factors("saturation", saturation),
        ]

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        require_bytes(images, type(self).__name__)
        factors = []
        for index, (low, high) in enumerate(self._factors):
            factors.append(between(draws[:, index], low, high).int())
        order = between(draws[:, 3], 0, len(ORDERS) - 1)
        pixels = images.int()
        for place in range(len(self._factors)):
            pixels = self._change(pixels, _kind(order, place), factors)
        return pixels.byte()

    def _change(self, pixels: Tensor, kind: Tensor, factors: list[Tensor]) -> Tensor:
        """Each image blended with black, its mean grey or its own grey, as `kind` `(B,)` says."""
        gray = _gray(pixels)
        mean = _mean(gray)
        kind = kind.view(-1, 1, 1, 1)
        other = torch.where(kind == SATURATION, gray, torch.zeros_like(gray))
        other = torch.where(kind == CONTRAST, mean, other)
        factor = torch.where(kind == SATURATION, _shaped(factors[SATURATION]), 0)
        for each in (BRIGHTNESS, CONTRAST):
            factor = torch.where(kind == each, _shaped(factors[each]), factor)
        blend = pixels * factor + other * (ONE - factor) + HALF
        return (blend >> 16).clamp_(0, 255)


class RandomGrayscale:
    """Grey instead of colour, for each image with probability `p`. uint8 images alone."""

    draws = 1
    moves = False

    def __init__(self, p: float = 0.1) -> None:
        check_probability(p)
        self._p = p

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        require_bytes(images, type(self).__name__)
        is_gray = happens(draws, self._p).view(-1, 1, 1, 1)
        return torch.where(is_gray, _gray(images.int()).byte(), images)


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
        boxes = self._boxes(draws[:, :-1], height, width)
        is_erased = boxes.fits & happens(draws[:, -1], self._p)
        rows = _inside(boxes.top, boxes.height, height) & is_erased.unsqueeze(1)
        columns = _inside(boxes.left, boxes.width, width)
        area = rows[:, None, :, None] & columns[:, None, None, :]
        return torch.where(area, color(self._value, images), images)


def _factors(name: str, amount: Amount) -> tuple[int, int]:
    """The least and the largest factor, of `ONE`."""
    if isinstance(amount, int | float):
        if not 0 <= amount < LARGEST_FACTOR:
            raise ValueError(
                f"{name} must be from 0 to {LARGEST_FACTOR - 1:g}, not {amount}"
            )
        low, high = max(0.0, 1.0 - amount), 1.0 + amount
    else:
        low, high = amount
        if not 0 <= low <= high <= LARGEST_FACTOR:
            raise ValueError(
                f"{name} must have 0 ≤ low ≤ high ≤ {LARGEST_FACTOR:g}, not {amount}"
            )
    return round(low * ONE), round(high * ONE)


def _kind(order: Tensor, place: int) -> Tensor:
    """Which change comes at `place` in each image's order, int64 `(B,)`."""
    kind = torch.zeros_like(order)
    for number, kinds in enumerate(ORDERS):
        kind += (order == number) * kinds[place]
    return kind


def _shaped(factor: Tensor) -> Tensor:
    return factor.view(-1, 1, 1, 1)


def _gray(pixels: Tensor) -> Tensor:
    """The brightness of each pixel, int32 `(B, 1, H, W)`, of one or three channels."""
    channels = pixels.shape[1]
    if channels == 1:
        return pixels
    if channels != len(LUMA):
        raise ValueError(f"colours are of images with 1 or 3 channels, not {channels}")
    red, green, blue = (pixels[:, i : i + 1] * weight for i, weight in enumerate(LUMA))
    return (red + green + blue + HALF) >> 16


def _mean(gray: Tensor) -> Tensor:
    """The mean brightness of each image, rounded: `(B, 1, 1, 1)`."""
    area = gray.shape[-2] * gray.shape[-1]
    total = gray.sum((2, 3), keepdim=True)
    return torch.div(total + area // 2, area, rounding_mode="floor").int()


def _inside(start: Tensor, length: Tensor, size: int) -> Tensor:
    """Which of `size` places are in `[start, start + length)`: bool `(B, size)`."""
    places = torch.arange(size, device=start.device)
    start, length = start.unsqueeze(1), length.unsqueeze(1)
    return (places >= start) & (places < start + length)
