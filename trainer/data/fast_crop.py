"""torchvision's RandomResizedCrop and RandomHorizontalFlip of images alone in less time, with the same bits.

torch resizes bytes fastest where the channels of a pixel lie together, as in decoded images. Of a part of one image by
itself it does not see that, and copies the pixels to and fro.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
        return Flip(transform)
    if type(transform) is not v2.RandomResizedCrop or not transform.antialias:
        return transform
    # Text, or a member of an enumeration: as it was given.
    mode = getattr(transform.interpolation, "value", transform.interpolation)
    return ResizedCrop(transform) if mode == "bilinear" and _is_same() else transform


def is_decoded_image(image: Any) -> bool:
    """True for bytes on the CPU, three channels together."""
    return (
        type(image) is Tensor
        and image.dtype == torch.uint8
        and image.dim() == 3
        and image.shape[0] == 3
        and image.stride(0) == 1
        and image.device.type == "cpu"
    )


class ResizedCrop:
    """torchvision's, whose draws are made again here, one by one: it takes longer over their surroundings."""

    def __init__(self, transform: Any) -> None:
        self._transform = transform
        self.size = list(transform.size)
        self._ratios = transform.ratio
        self._log_ratios = torch.log(torch.tensor(transform.ratio)).tolist()
        # What is drawn goes here: to make a tensor for it takes as long again.
        self._float = torch.empty(1)
        self._index = torch.empty(1, dtype=torch.int64)

    def __call__(self, image: Any) -> Any:
        if not is_decoded_image(image):
            return self._transform(image)
        part = self.draw(image)
        if list(part.shape[1:]) == self.size:
            return part
        resized = resize_uint8(part, self.size)
        # In memory as torchvision leaves it: a later transform's sums may depend on that.
        is_of_whole_rows = part.permute(1, 2, 0).is_contiguous()
        if is_of_whole_rows:
            return resized
        # NumPy takes half of torch's time for it.
        return torch.from_numpy(np.ascontiguousarray(resized.numpy()))

    def draw(self, image: Tensor) -> Tensor:
        """The part of a decoded image that is to be resized; a view."""
        top, left, height, width = self._box(*image.shape[1:])
        return image[:, top : top + height, left : left + width]

    def _box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Top, left, height and width of a part of an image."""
        for _ in range(ATTEMPTS):
            share = self._float.uniform_(*self._transform.scale).item()
            ratio = self._float.uniform_(*self._log_ratios).exp_().item()
            area = height * width * share
            part_width = round(math.sqrt(area * ratio))
            part_height = round(math.sqrt(area / ratio))
            if 0 < part_width <= width and 0 < part_height <= height:
                top = self._index.random_(0, height - part_height + 1).item()
                left = self._index.random_(0, width - part_width + 1).item()
                return int(top), int(left), part_height, part_width
        return middle_part(height, width, min(self._ratios), max(self._ratios))


class Flip:
    """Without what torchvision does for pairs of images and targets, which takes longer than to flip."""

    def __init__(self, transform: Any) -> None:
        self._transform = transform

    def __call__(self, image: Any) -> Any:
        if type(image) is not Tensor:
            return self._transform(image)
        return image.flip(-1) if self.draw() else image

    def draw(self) -> bool:
        """Whether the next image is to be flipped."""
        return not torch.rand(1) >= self._transform.p


class CropBatch:
    """Batches of decoded images, cropped, resized and then perhaps flipped: each straight into the batch.

    One by one, each image has its channels put apart and is copied once more into a batch, which takes as long as to
    resize it. Here they stay together, as in `torch.channels_last`; a device puts them apart where it normalises.
    """

    def __init__(self, crop: ResizedCrop, flip: Flip | None) -> None:
        self._crop = crop
        self._flip = flip

    def empty(self, count: int) -> Tensor:
        """Memory for a batch of `count` images, uint8 `(count, 3, H, W)`."""
        shape = (count, 3, *self._crop.size)
        return torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)

    def fill(self, batch: Tensor, position: int, image: Tensor) -> None:
        """Draw as for a sample, and put what becomes of a decoded image at its position."""
        part = self._crop.draw(image)
        out = batch[position : position + 1]
        if list(part.shape[1:]) == self._crop.size:
            out[0] = part
        else:
            resize_uint8(part, self._crop.size, out)
        if self._flip is not None and self._flip.draw():
            out[0] = out[0].flip(-1)


def crop_batch(transforms: Sequence[Any]) -> CropBatch | None:
    """For fast forms of a crop, or of a crop and a flip; None for any others."""
    match transforms:
        case [ResizedCrop() as crop]:
            return CropBatch(crop, None)
        case [ResizedCrop() as crop, Flip() as flip]:
            return CropBatch(crop, flip)
    return None


@cache
def _is_same() -> bool:
    """Whether torchvision's crop draws the same, and gives the same bits, here as ours."""
    try:
        return _gives_the_same()
    except (AttributeError, RuntimeError, TypeError):
        # Another torch may lack the kernel that writes into a batch, or call it otherwise.
        return False


def _gives_the_same() -> bool:
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
            result = ResizedCrop(crop)(image)
            same_draws = torch.equal(torch.get_rng_state(), state)
            if not same_draws or not torch.equal(result, expected):
                return False
            torch.default_generator.manual_seed(seed)
            crops = CropBatch(ResizedCrop(crop), None)
            batch = crops.empty(1)
            crops.fill(batch, 0, image)
            if not torch.equal(batch[0], expected):
                return False
    return True
