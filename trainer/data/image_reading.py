"""How image files become images: the keys of `data` that have a say in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from trainer.config.data_section import DataConfig
from trainer.data.decoding import decode, read_for_device
from trainer.data.image_list import JpegFile
from trainer.data.short_side import choose_short_side, shrink


@dataclass(frozen=True)
class ImageReading:
    """A file of more than `max_pixels` pixels is refused; larger images are made small, to a `short_side` in pixels.

    `decode_short_side` is the key of that name, which lets JPEG files be decoded smaller. With `leaves_out`, a run goes
    on without the images that cannot be decoded.
    """

    max_pixels: int | None = None
    decode_short_side: int | None = None
    short_side: int | None = None
    leaves_out: bool = False

    @classmethod
    def of(cls, section: DataConfig) -> ImageReading:
        """What the section `data` says."""
        return cls(
            section.max_pixels,
            section.decode_short_side,
            choose_short_side(section).pixels,
            leaves_out=section.bad_samples == "quarantine",
        )

    def read(self, path: Path, channels: int = 3) -> Tensor:
        """The image, uint8 `(channels, H, W)`, turned upright by its EXIF data. Raises `DataError`."""
        image = decode(path, channels, self.max_pixels, self.decode_short_side)
        return shrink(image, self.short_side)

    def read_for_device(self, path: Path) -> JpegFile | Tensor:
        """A JPEG file that the device is to decode, looked at; any other one's image. Raises `DataError`."""
        return read_for_device(path, self.max_pixels)
