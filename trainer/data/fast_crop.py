"""torchvision's RandomResizedCrop and RandomHorizontalFlip of an image alone in less time, with the same bits.

torch resizes bytes fastest where the channels of a pixel lie together, as in decoded images. Of a part of one image by
itself it does not see that, and copies the pixels to and fro.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.data.batch_transforms.boxes import ATTEMPTS, middle_part
from trainer.data.short_side import resize_uint8


def fast_form(transform: Any) -> Any:
    """A transform of an image alone that gives what `transform` gives, faster if it is one of the two, or itself.

    Whether the bits are the same is tried, not believed: it depends on the processor and on torchvision's version.
    """
    from torchvision.transforms import v2

    if type(transform) is v2.RandomHorizontalFlip:
        return _Flip(transform)
    if type(transform) is not v2.RandomResizedCrop or not transform.antialias:
        return transform
    # Text, or a member of an enumeration: as it was given.
    mode = getattr(transform.interpolation, "value", transform.interpolation)
    return _ResizedCrop(transform) if mode == "bilinear" and _is_same() else transform


def _is_decoded_image(image: Any) -> bool:
    """True for bytes on the CPU, three channels together."""
    return (
        type(image) is Tensor
        and image.dtype == torch.uint8
        and image.dim() == 3
        and image.shape[0] == 3
        and image.stride(0) == 1
        and image.device.type == "cpu"
    )


class _ResizedCrop:
    """torchvision's, whose draws are made again here, one by one: it takes longer over their surroundings."""

    def __init__(self, transform: Any) -> None:
        self._transform = transform
        self._size = list(transform.size)
        self._ratios = transform.ratio
        self._log_ratios = torch.log(torch.tensor(transform.ratio)).tolist()

    def __call__(self, image: Any) -> Any:
        if not _is_decoded_image(image):
            return self._transform(image)
        top, left, height, width = self._place(*image.shape[1:])
        part = image[:, top : top + height, left : left + width]
        if [height, width] == self._size:
            return part
        resized = resize_uint8(part, self._size)
        # In memory as torchvision leaves it: a later transform's sums may depend on that.
        is_of_whole_rows = part.permute(1, 2, 0).is_contiguous()
        if is_of_whole_rows:
            return resized
        # NumPy takes half of torch's time for it.
        return torch.from_numpy(np.ascontiguousarray(resized.numpy()))

    def _place(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Top, left, height and width of a part of an image."""
        for _ in range(ATTEMPTS):
            share = torch.empty(1).uniform_(*self._transform.scale).item()
            ratio = torch.exp(torch.empty(1).uniform_(*self._log_ratios)).item()
            area = height * width * share
            part_width = round(math.sqrt(area * ratio))
            part_height = round(math.sqrt(area / ratio))
            if 0 < part_width <= width and 0 < part_height <= height:
                top = torch.randint(0, height - part_height + 1, size=(1,)).item()
                left = torch.randint(0, width - part_width + 1, size=(1,)).item()
                return int(top), int(left), part_height, part_width
        return middle_part(height, width, min(self._ratios), max(self._ratios))


class _Flip:
    """Without what torchvision does for pairs of images and targets, which takes longer than to flip."""

    def __init__(self, transform: Any) -> None:
        self._transform = transform

    def __call__(self, image: Any) -> Any:
        if type(image) is not Tensor:
            return self._transform(image)
        return image if torch.rand(1) >= self._transform.p else image.flip(-1)


@cache
def _is_same() -> bool:
    """Whether torchvision's crop draws the same, and gives the same bits, here as ours."""
    from torchvision.transforms import v2

    height, width = 37, 53
    values = torch.arange(3 * height * width) * 2654435761 % 251
    image = values.to(torch.uint8).view(height, width, 3).permute(2, 0, 1)
    crop = v2.RandomResizedCrop([24, 30])
    with torch.random.fork_rng(devices=[]):
        for seed in range(4):
            torch.default_generator.manual_seed(seed)
            expected, state = crop(image), torch.get_rng_state()
            torch.default_generator.manual_seed(seed)
            result = _ResizedCrop(crop)(image)
            same_draws = torch.equal(torch.get_rng_state(), state)
            if not same_draws or not torch.equal(result, expected):
                return False
    return True
