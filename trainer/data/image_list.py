"""Images of several sizes as one micro-batch: in one buffer on their way to the device, as a list there.

A loader process hands over every tensor in a piece of shared memory of its own, with an open file. So a micro-batch is
one buffer, whatever the number of its images. It may also hold files that the device has yet to decode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

# The transpositions and flips of the last two dimensions that turn an image upright, by EXIF's orientation.
FLIPS: dict[int, tuple[bool, tuple[int, ...]]] = {
    2: (False, (-1,)),
    3: (False, (-2, -1)),
    4: (False, (-2,)),
    5: (True, ()),
    6: (True, (-1,)),
    7: (True, (-2, -1)),
    8: (True, (-2,)),
}


class JpegFile(NamedTuple):
    """A JPEG file that has been looked at, and not decoded: `data` is uint8 `(bytes,)` on the host."""

    data: Tensor
    height: int
    width: int
    orientation: int = 1  # EXIF's; 1 is upright


class Entry(NamedTuple):
    """What a part of a buffer holds: the pixels of an image of `shape`, or a file that gives one."""

    start: int
    end: int
    shape: tuple[int, int, int]  # (C, H, W), not turned
    is_file: bool = False
    orientation: int = 1


@dataclass(frozen=True)
class ImageList:
    """Images, uint8 `(C, H, W)` each, on one device."""

    images: Sequence[Tensor]

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device, non_blocking: bool = False) -> ImageList:
        moved = [image.to(device, non_blocking=non_blocking) for image in self.images]
        return replace(self, images=moved)

    def pin_memory(self) -> ImageList:
        if any(image.device.type != "cpu" for image in self.images):
            return self  # decoded where they are to be
        return replace(self, images=[image.pin_memory() for image in self.images])


@dataclass(frozen=True)
class PackedImages:
    """Images one after the other in a buffer, uint8 `(bytes,)`, and what each part of it is."""

    data: Tensor
    entries: Sequence[Entry]
    dtype = torch.uint8

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def has_files(self) -> bool:
        """True if some of the images are still to be decoded."""
        return any(entry.is_file for entry in self.entries)

    def parts(self) -> Iterator[tuple[Entry, Tensor]]:
        """Each entry with the image, uint8 `(C, H, W)`, or the file, uint8 `(bytes,)`, that it is of."""
        for entry in self.entries:
            part = self.data[entry.start : entry.end]
            yield entry, part if entry.is_file else part.view(entry.shape)

    def unpacked(self) -> ImageList:
        """The images, as views of the buffer. None may be a file."""
        assert not self.has_files, "the device decodes files before they are unpacked"
        return ImageList([image for _, image in self.parts()])

    def to(self, device: torch.device, non_blocking: bool = False) -> PackedImages:
        return replace(self, data=self.data.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedImages:
        return replace(self, data=self.data.pin_memory())


def pack(images: Sequence[Tensor | JpegFile]) -> PackedImages:
    """Images, uint8 `(C, H, W)`, and files, as one buffer."""
    entries: list[Entry] = []
    pieces: list[Tensor] = []
    start = 0
    for image in images:
        if isinstance(image, JpegFile):
            piece = image.data
            shape = (3, image.height, image.width)
            entry = Entry(start, start + len(piece), shape, True, image.orientation)
        else:
            piece = image.reshape(-1)
            channels, height, width = image.shape
            entry = Entry(start, start + len(piece), (channels, height, width))
        start = entry.end
        entries.append(entry)
        pieces.append(piece)
    return PackedImages(torch.cat(pieces), tuple(entries))


def are_of_several_sizes(images: Sequence[object]) -> bool:
    """True for images, uint8 `(C, H, W)`, that have the same channels and not all the same size."""
    shapes = set()
    for image in images:
        if not isinstance(image, Tensor):
            return False
        if image.dim() != 3 or image.dtype != torch.uint8:
            return False
        shapes.add(image.shape)
    channels = {shape[0] for shape in shapes}
    return len(shapes) > 1 and len(channels) == 1


def turned_upright(image: Tensor, orientation: int) -> Tensor:
    """An image `(C, H, W)` turned upright by EXIF's `orientation`."""
    is_transposed, dimensions = FLIPS.get(orientation, (False, ()))
    if is_transposed:
        image = image.transpose(-2, -1)
    return image.flip(dimensions) if dimensions else image
