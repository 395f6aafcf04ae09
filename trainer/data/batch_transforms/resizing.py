"""Parts of images, resized to one size, for whole batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.data.batch_transforms.arguments import height_and_width, interval
from trainer.data.batch_transforms.bilinear import resize
from trainer.data.batch_transforms.boxes import (
    DRAWS,
    BoxDraw,
    Sizes,
    middle_part,
    root_of_area,
)
from trainer.data.batch_transforms.several_sizes import in_groups, numbers_on
from trainer.exact.structures import dtype_name


class RandomResizedCrop:
    """A random part of each image, of `scale` of its area and with sides in `ratio`, resized to `size` pixels.

    Bilinear, with antialiasing. uint8 images alone, which may have several sizes.

    Args:
        size: of a side, or [height, width].
        scale: least and largest share of the image's area.
        ratio: least and largest width over height.
    """

    draws = DRAWS

    def __init__(
        self,
        size: int | list[int],
        scale: list[float] | tuple[float, float] = (0.08, 1.0),
        ratio: list[float] | tuple[float, float] = (3 / 4, 4 / 3),
    ) -> None:
        self._height, self._width = height_and_width(size)
        self._ratio = interval("ratio", ratio)
        area = interval("scale", scale)
        if area[0] > 1:
            raise ValueError(
                f"scale is of the image's area, and no part is larger than the image: {scale}"
            )
        self._boxes = BoxDraw(area, self._ratio, inside=False)

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        require_bytes(images, type(self).__name__)
        height, width = images.shape[-2:]
        middle = middle_part(height, width, *self._ratio)
        sizes = Sizes(height, width, root_of_area(height, width))
        return self._crop(images, draws, sizes, middle)

    def of_several_sizes(self, images: Sequence[Tensor], draws: Tensor) -> Tensor:
        """The same of uint8 images `(C, H, W)`, each of a size of its own."""
        return in_groups(images, draws, self._crop_each)

    def _crop_each(self, images: Sequence[Tensor], draws: Tensor) -> Tensor:
        rows = []
        for image in images:
            height, width = image.shape[-2:]
            middle = middle_part(height, width, *self._ratio)
            rows.append((height, width, root_of_area(height, width), *middle))
        columns = numbers_on(draws.device, rows)
        sizes, middles = Sizes(*columns[:3]), columns[3:]
        return self._crop(images, draws, sizes, middles)

    def _crop(
        self,
        images: Tensor | Sequence[Tensor],
        draws: Tensor,
        sizes: Sizes,
        middle: Sequence[Any],
    ) -> Tensor:
        """A part of each image, resized. `middle` is what is taken where no box fits."""
        boxes = self._boxes(draws, sizes)
        top, left, height, width = (
            torch.where(boxes.fits, drawn, fixed)
            for drawn, fixed in zip(boxes[:4], middle, strict=True)
        )
        return resize(images, (top, left, height, width), (self._height, self._width))


class Resize:
    """Each image resized to `size` pixels, whatever its own size and its ratio of sides.

    Bilinear, with antialiasing. uint8 images alone, which may have several sizes.

    Args:
        size: [height, width].
    """

    draws = 0

    def __init__(self, size: list[int]) -> None:
        if not isinstance(size, list | tuple):
            raise ValueError(
                f"size is [height, width], not {size}: a batch has images of one size"
            )
        self._height, self._width = height_and_width(size)

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        require_bytes(images, type(self).__name__)
        return self._resize_each(images.unbind(), draws)

    def of_several_sizes(self, images: Sequence[Tensor], draws: Tensor) -> Tensor:
        """The same of uint8 images `(C, H, W)`, each of a size of its own."""
        return in_groups(images, draws, self._resize_each)

    def _resize_each(self, images: Sequence[Tensor], draws: Tensor) -> Tensor:
        rows = [(0, 0, *image.shape[-2:]) for image in images]
        box = numbers_on(draws.device, rows)
        return resize(images, box, (self._height, self._width))


def require_bytes(images: Tensor, name: str) -> None:
    """Raise `ValueError` for images that are not uint8."""
    if images.dtype != torch.uint8:
        dtype = dtype_name(images.dtype)
        raise ValueError(f"{name} is for uint8 images, not {dtype}")
