"""Some of torchvision's transforms, of images alone, in less time and with the same bits.

torch resizes bytes fastest where the channels of a pixel lie together, as in decoded images. Of a part of one image by
itself it does not see that, and copies the pixels to and fro. What a centre crop takes, and the resizing of an image
that has its size already, is torchvision's care for inputs of every kind.
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
    """A transform of an image alone that gives what `transform` gives, faster if it is one of those here, or itself.

    Whether the bits are the same is tried, not believed: it depends on the processor and on torchvision's version.
    """
    from torchvision.transforms import v2

    kind = type(transform)
    if kind is v2.RandomHorizontalFlip:
        return Flip(transform)
    if kind is v2.CenterCrop:
        return CenterCrop(transform)
    if kind not in (v2.Resize, v2.RandomResizedCrop):
        return transform
    # Text, or a member of an enumeration: as it was given.
    mode = getattr(transform.interpolation, "value", transform.interpolation)
    if mode != "bilinear":
        return transform
    if kind is v2.Resize:
        return Resize(transform)
    if transform.antialias and _is_same():
        return ResizedCrop(transform)
    return transform


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
                # The top before the left, as torchvision draws them.
                top = self._place(height - part_height)
                left = self._place(width - part_width)
                return top, left, part_height, part_width
        lowest, highest = min(self._ratios), max(self._ratios)
        return middle_part(height, width, lowest, highest)

    def _place(self, last: int) -> int:
        """One of 0 to `last`, drawn."""
        return int(self._index.random_(0, last + 1).item())


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
        # The comparison is torchvision's own, turned around: a p that is no number flips here, too.
        return not torch.rand(1) >= self._transform.p


class Resize:
    """torchvision's, which is not asked for an image that has the size."""

    def __init__(self, transform: Any) -> None:
        self._transform = transform
        size = transform.size
        self._short_side: int | None = None
        self._sides: tuple[int, ...] = ()
        if isinstance(size, list | tuple) and transform.max_size is None:
            if len(size) == 1:
                self._short_side = size[0]
            else:
                self._sides = tuple(size)

    def __call__(self, image: Any) -> Any:
        if is_decoded_image(image):
            sides = image.shape[1:]
            if sides == self._sides or min(sides) == self._short_side:
                return image
        return self._transform(image)


class CenterCrop:
    """torchvision's, where nothing is to be padded."""

    def __init__(self, transform: Any) -> None:
        self._transform = transform
        self._height, self._width = transform.size

    def __call__(self, image: Any) -> Any:
        if not is_decoded_image(image):
            return self._transform(image)
        _, height, width = image.shape
        if height < self._height or width < self._width:
            return self._transform(image)
        top = round((height - self._height) / 2)
        left = round((width - self._width) / 2)
        return image[:, top : top + self._height, left : left + self._width]


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

    # Sides that are no multiple of a register's width, and pixels without a pattern; any others would do as well.
    height, width = 37, 53
    values = torch.arange(3 * height * width) * 2654435761 % 251
    pixels = values.to(torch.uint8).view(height, width, 3)
    image = pixels.permute(2, 0, 1)
    crop = v2.RandomResizedCrop([24, 30])
    # The caller's generator is left as it is: the trial must not change what a run draws.
    with torch.random.fork_rng(devices=[]):
        return all(_gives_the_same_of(crop, image, seed) for seed in range(4))


def _gives_the_same_of(crop: Any, image: Tensor, seed: int) -> bool:
    """Whether ours draw and give what torchvision's `crop` does after `seed`, by itself and into a batch."""
    generator = torch.default_generator
    generator.manual_seed(seed)
    expected = crop(image)
    expected_state = torch.get_rng_state()

    generator.manual_seed(seed)
    result = ResizedCrop(crop)(image)
    state = torch.get_rng_state()
    if not torch.equal(state, expected_state) or not torch.equal(result, expected):
        return False

    generator.manual_seed(seed)
    crops = CropBatch(ResizedCrop(crop), None)
    batch = crops.empty(1)
    crops.fill(batch, 0, image)
    return torch.equal(batch[0], expected)
