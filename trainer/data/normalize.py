"""Images in the form that the model sees: scaled, in the run's dtype, normalised by channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trainer.data.conversion import describe
from trainer.errors import ConfigError, DataError
from trainer.exact.structures import dtype_name, map_tensors

LARGEST_UINT16 = 65535
# Of a core's cache: what one pass leaves there, the next one need not fetch from memory.
CACHE_BYTES = 1 << 20
# Whole numbers of other widths. Ids, which models embed, are int64.
UNSCALED = (torch.int8, torch.int16, torch.int32, torch.uint32, torch.uint64)


class Normalize(nn.Module):
    """Images on the device: bytes are scaled to [0, 1], cast to the run's dtype, then `(x - mean) / std` per channel.

    uint16 is scaled by its range too. Images of other whole numbers are refused: their range says nothing of theirs.

    With `puts_channels_apart`, bytes that lie as `torch.channels_last` come out as others do.

    With `structured` (`data.collate` or `data.columns`), a list of images is treated image by image; in other ones
    bytes `(N, C, H, W)` are scaled, and floats cast.
    """

    def __init__(
        self,
        mean: list[float] | None,
        std: list[float] | None,
        dtype: torch.dtype,
        *,
        structured: bool = False,
        puts_channels_apart: bool = False,
    ) -> None:
        super().__init__()
        self._structured = structured
        self._format = torch.preserve_format
        if puts_channels_apart:
            self._format = torch.contiguous_format
        self._dtype = dtype
        self._shifts = mean is not None or std is not None
        self.scale: Tensor
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("scale", torch.tensor(1 / 255, dtype=dtype))
        self.register_buffer(
            "mean", torch.tensor(mean or [0.0], dtype=dtype).view(-1, 1, 1)
        )
        self.register_buffer(
            "std", torch.tensor(std or [1.0], dtype=dtype).view(-1, 1, 1)
        )

    def forward(self, images: Any) -> Any:
        """`(N, C, H, W)` in, the same out; anything that is not a tensor of images is returned as it is.

        Raises `ConfigError` where a mean or std would have no effect or does not fit, `DataError` for whole numbers.
        """
        if not isinstance(images, Tensor):
            return self._structure(images)
        if images.dtype == torch.uint8:
            return self._from_bytes(images)
        if images.is_floating_point():
            images = images.to(self._dtype)
        elif images.dtype == torch.uint16:
            images = images.to(self._dtype) / LARGEST_UINT16
        elif images.dim() >= 4 and images.dtype in UNSCALED:
            dtype = dtype_name(images.dtype)
            raise DataError(
                f"images are {dtype}, whose range is not that of brightness; return uint8, uint16 or float images, or "
                f"ids as int64"
            )
        if not self._shifts:
            return images
        self._check_channels(images)
        return (images - self.mean).div_(self.std)

    def _from_bytes(self, images: Tensor) -> Tensor:
        if self._shifts:
            self._check_channels(images)
        if self._is_worked_on_in_parts(images):
            return self._in_parts(images)
        result = images.to(self._dtype, memory_format=self._format)
        return self._normalize_(result)

    def _is_worked_on_in_parts(self, images: Tensor) -> bool:
        # A program that is made of this takes batches of any size.
        if images.device.type != "cpu" or torch.compiler.is_compiling():
            return False
        size = images.numel() * self._dtype.itemsize
        return images.dim() == 4 and size > CACHE_BYTES

    def _in_parts(self, images: Tensor) -> Tensor:
        """The same of a few images at a time, all passes over them while they are in the cache."""
        result = torch.empty_like(images, dtype=self._dtype, memory_format=self._format)
        # Every pass is shared out among the threads in the same way.
        of_all_cores = CACHE_BYTES * torch.get_num_threads()
        count = max(1, of_all_cores // result[0].nbytes)
        for first in range(0, len(images), count):
            part = slice(first, first + count)
            self._normalize_(result[part].copy_(images[part]))
        return result

    def _normalize_(self, images: Tensor) -> Tensor:
        """Brightness from 0 to 255, in the run's dtype, made what the model sees."""
        # In place: on the CPU, new memory costs more than the arithmetic.
        images.mul_(self.scale)
        if self._shifts:
            images.sub_(self.mean).div_(self.std)
        return images

    def _structure(self, inputs: Any) -> Any:
        if self._structured and are_images(inputs):
            return [self.forward(image) for image in inputs]
        self._check_effect(inputs)
        return map_tensors(self._part, inputs) if self._structured else inputs

    def _part(self, value: Tensor) -> Tensor:
        if value.dtype == torch.uint8 and value.dim() == 4:
            return value * self.scale
        return value.to(self._dtype) if value.is_floating_point() else value

    def _check_effect(self, inputs: Any) -> None:
        if self._shifts:
            raise ConfigError(
                "data.mean",
                f"and data.std have no effect on inputs that are {describe(inputs)}: they are for one tensor of "
                f"images, or a list of them; leave them out, and normalise by {{name: Normalize, mean: …, std: …}} in "
                f"data.train_transforms and data.val_transforms, or in the model",
            )

    def _check_channels(self, images: Tensor) -> None:
        is_brightness = images.is_floating_point() or images.dtype == torch.uint8
        if images.dim() < 3 or not is_brightness:
            raise ConfigError(
                "data.mean",
                f"and data.std are for images, not for inputs of {tuple(images.shape)}"
                + ("" if is_brightness else f" and {images.dtype}"),
            )
        channels = images.shape[-3]
        if len(self.mean) not in (1, channels) or len(self.std) not in (1, channels):
            raise ConfigError(
                "data.mean",
                f"has {len(self.mean)} values and data.std has {len(self.std)}, for images of {channels} channels",
            )

    def undo(self, images: Tensor) -> Tensor:
        """The images before normalisation, in [0, 1], on the CPU: for figures."""
        if self._shifts:
            images = images * self.std + self.mean
        return images.float().clamp(0, 1).cpu()


def are_images(inputs: Any) -> bool:
    """True for a list of images `(C, H, W)`, not always of one size."""
    if not isinstance(inputs, list | tuple) or not inputs:
        return False
    return all(isinstance(image, Tensor) and image.dim() == 3 for image in inputs)
