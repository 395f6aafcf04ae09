"""`data.short_side`: how small an image may be made before the transforms see it, and the making.

It is part of what a run computes: a random crop of a smaller image is another one than of the whole image. So it is a
key of its own, which gives the same pixels with `data.cache=decoded` and without.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.config.data_section import DataConfig
from trainer.config.schema import Config
from trainer.data.transform_sizes import (
    SIZELESS,
    Listed,
    name_of,
    own_size,
    transform_lists,
)

# A random resized crop of 224 pixels has images of 256: what validation customarily makes of them, too.
CROP_MARGIN = 8 / 7


class ShortSide(NamedTuple):
    """`pixels` of the short side of larger images; None for images as they are, and then why, if there is a reason."""

    pixels: int | None
    reason: str = ""


def shrink(image: Tensor, pixels: int | None) -> Tensor:
    """The image, uint8 `(C, H, W)`, with a short side of at most `pixels`; a smaller one as it is, and any if None.

    Bilinear with antialiasing, in whole numbers: the same on any number of threads. It equals torchvision's
    `Resize(pixels)`. The pixels of a row lie together, `(H, W, C)` in memory, as decoders leave them.
    """
    height, width = image.shape[-2:]
    if pixels is None or min(height, width) <= pixels:
        return image
    # Cut off, as torchvision does.
    long_side = int(pixels * max(height, width) / min(height, width))
    size = [pixels, long_side] if height <= width else [long_side, pixels]
    return resize_uint8(image, size)


def resize_uint8(image: Tensor, size: list[int], out: Tensor | None = None) -> Tensor:
    """The image, uint8 `(C, h, w)`, as `(C, *size)`: bilinear, antialiased. `out`: a batch of one to write it into.

    torch's kernel is several times as fast on pixels whose channels lie together. It does not notice that of a part of
    one image by itself, so it is told.
    """
    channels, height, width = image.shape
    pixels = image.permute(1, 2, 0).contiguous()
    strides = (image.numel(), 1, width * channels, channels)
    batch = pixels.as_strided((1, channels, height, width), strides)
    if out is not None:
        # What `interpolate` calls, which cannot write into memory that is there.
        kernel: Any = torch._C._nn._upsample_bilinear2d_aa
        kernel(batch, size, False, None, None, out=out)
        return out.squeeze(0)
    resized = torch.nn.functional.interpolate(
        batch, size=size, mode="bilinear", align_corners=False, antialias=True
    )
    return resized.squeeze(0)


def with_short_side(config: Config) -> Config:
    """The config with the number that `data.short_side=auto` stands for, so that `config.yaml` says what ran."""
    pixels = choose_short_side(config.data).pixels
    if config.data.short_side != "auto" or pixels is None:
        return config
    return replace(config, data=replace(config.data, short_side=pixels))


def choose_short_side(section: DataConfig) -> ShortSide:
    """What `data.short_side` stands for: a pure function of the config.

    `auto` is the largest size that the first sizing transform of each list asks for: Resize and its like their own,
    RandomResizedCrop 8/7 of its own. Where a list has none, or begins with what reads pixels at their own scale (a
    RandomCrop, a blur, a transform of one's own), images stay as they are.
    """
    if isinstance(section.short_side, int):
        return ShortSide(section.short_side)
    if section.short_side == "full":
        return ShortSide(None, "data.short_side=full")
    if section.cache != "decoded":
        return ShortSide(None)
    largest = 0
    for key, transforms in transform_lists(section):
        needed = _needed_by(key, transforms)
        if needed.pixels is None:
            return needed
        largest = max(largest, needed.pixels)
    return ShortSide(largest)


def _needed_by(key: str, transforms: Sequence[Listed]) -> ShortSide:
    """The short side that a list of transforms needs, which begins with `key`."""
    for listed in transforms:
        name, item = name_of(listed.item), listed.item
        if name in SIZELESS:
            continue
        pixels = _needed_size(name, item if isinstance(item, dict) else {})
        return ShortSide(
            pixels,
            f"{listed.list_key} has {name}, which reads an image at its own scale",
        )
    return ShortSide(None, f"{key} makes no image smaller")


def _needed_size(name: str, arguments: dict[str, Any]) -> int | None:
    is_resize = name in ("Resize", "RandomShortestSize", "RandomResize")
    is_bilinear = arguments.get("interpolation", "bilinear") == "bilinear"
    if is_resize and not (is_bilinear and arguments.get("antialias", True)):
        return None  # nothing would be left for it to do
    size = own_size(name, arguments)
    if is_resize:
        return size
    if name == "RandomResizedCrop" and size is not None:
        return math.ceil(size * CROP_MARGIN)
    return None
