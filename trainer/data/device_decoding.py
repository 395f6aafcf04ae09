"""`data.decode=device`: the JPEG files of a micro-batch decoded at once, on the GPU that trains.

Loader processes read the files and look at them, as they do before they decode. What the device cannot decode, and
every other kind of file, the CPU's libraries decode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.config.data_section import DataConfig
from trainer.data.bad_samples import is_bad_sample
from trainer.data.batch_transforms.base import BatchTransforms
from trainer.data.batches import Loaded, MicroBatch
from trainer.data.datasets import MapDataset
from trainer.data.device_decoders import FileDecoder
from trainer.data.folder import ImageFolder
from trainer.data.image_list import Entry, ImageList, PackedImages, turned_upright
from trainer.data.samples import KeyedDataset
from trainer.errors import ConfigError, DataError
from trainer.exact.structures import map_tensors

KEY = "data.decode"
ON_HOST = "works on decoded images of the host, and data.decode=device decodes them"


def check_decoding(
    section: DataConfig, dataset: MapDataset, transforms: BatchTransforms | None
) -> None:
    """Raise `ConfigError` where the images of `dataset` cannot be decoded on a device and made one size there."""
    if getattr(type(dataset), "__getitem__", None) is not ImageFolder.__getitem__:
        raise ConfigError(
            KEY,
            "device decodes the image files of data.name=folder, and these are no such files; leave it out",
        )
    for key, is_set, reason in _exclusions(section):
        if is_set:
            raise ConfigError(key, reason)
    if transforms is None or not transforms.takes_several_sizes:
        raise ConfigError(
            KEY,
            "device gives images of several sizes; let data.batch_transforms begin with {name: RandomResizedCrop, "
            "size: 224} or {name: Resize, size: [224, 224]}, which make one size of them there",
        )


def _exclusions(section: DataConfig) -> list[tuple[str, bool, str]]:
    """The keys that cannot be combined with it: whether each is set, and why not."""
    return [
        (
            "data.train_transforms",
            bool(section.train_transforms),
            f"{ON_HOST} later; name them in data.batch_transforms, or set data.decode=cpu",
        ),
        (
            "data.collate",
            section.collate is not None,
            f"{ON_HOST} later; leave one of them out",
        ),
        (
            "data.on_device",
            section.on_device,
            "reads every sample once, in one size, and data.decode=device gives several; leave one out",
        ),
        (
            "data.cache",
            bool(section.cache),
            "keeps decoded images, and data.decode=device decodes files; leave one of them out",
        ),
        (
            "data.decode_short_side",
            section.decode_short_side is not None,
            "is libjpeg's, and data.decode=device decodes files in full; leave one of them out",
        ),
        (
            "data.short_side",
            isinstance(section.short_side, int),
            f"{ON_HOST} later; leave it out: data.batch_transforms make the images smaller",
        ),
    ]


class DecodedImages(NamedTuple):
    """How many images there were, and of how many the CPU decoded the file."""

    images: int = 0
    not_given: int = 0  # the device is not given such files
    refused: int = 0  # it was given them, and did not decode them


class DeviceDecoding:
    """Decodes what loader processes hand over: `PackedImages` with files in, an `ImageList` on `device` out."""

    def __init__(
        self, dataset: KeyedDataset, decoder: FileDecoder, device: torch.device
    ) -> None:
        self._dataset = dataset
        self._device = device
        self.decoder = decoder
        self._decoded: dict[int, DecodedImages] = {}  # by epoch

    def take_decoded(self, epoch: int) -> DecodedImages:
        """What there was to decode for `epoch`, here, since the last call for it."""
        return self._decoded.pop(epoch, DecodedImages())

    def __call__(self, item: MicroBatch | Loaded) -> MicroBatch | Loaded:
        """The same with decoded images, of a `Loaded` without those that are bad.

        Raises `DataError` for the first bad image of a `MicroBatch`.
        """
        if isinstance(item, Loaded):
            return item if item.batch is None else self._readable(item, item.batch)
        images, errors = self._images(item)
        for error in errors.values():
            raise error
        return item._replace(inputs=ImageList(images))

    def _readable(self, item: Loaded, batch: MicroBatch) -> Loaded:
        images, errors = self._images(batch)
        if not errors:
            return item._replace(batch=batch._replace(inputs=ImageList(images)))
        bad = list(item.bad)
        ids = item.request.ids.tolist()
        for position, error in errors.items():
            if not is_bad_sample(error):
                raise error
            bad.append(self._dataset.name.describe_bad(ids[position], error))
        positions = [i for i in range(len(ids)) if i not in errors]
        request = item.request.only(positions)
        if not positions:
            return Loaded(None, request, bad)
        targets = map_tensors(lambda rows: rows[positions], batch.targets)
        readable = self._dataset.micro_batch(ImageList(images), targets, request)
        return Loaded(readable, request, bad)

    def _images(self, batch: MicroBatch) -> tuple[list[Tensor], dict[int, DataError]]:
        """The images on the device, and of each position without one, why."""
        packed, source = batch.inputs, batch.source
        assert isinstance(packed, PackedImages) and source is not None
        parts = list(packed.parts())
        files = [part for entry, part in parts if entry.is_file]
        decoded = iter(self._decode(files))
        images: list[Tensor] = []
        errors: dict[int, DataError] = {}
        refused = 0
        for position, (entry, part) in enumerate(parts):
            image: Tensor | None = part
            if entry.is_file:
                image = self._upright(next(decoded), entry)
            if image is None:
                try:
                    # By the CPU's libraries, which also say what is wrong with a bad one.
                    image, _ = self._dataset.pair(int(source.ids[position]))
                except DataError as error:
                    errors[position] = error
                    continue
                refused += 1
            images.append(image.to(self._device, non_blocking=True))
        not_given = len(parts) - len(files)
        of_batch = DecodedImages(len(images), not_given, refused)
        before = self._decoded.get(source.epoch, DecodedImages())
        self._decoded[source.epoch] = total([before, of_batch])
        return images, errors

    def _decode(self, files: list[Tensor]) -> Sequence[Tensor | None]:
        """What the device makes of each file; None where it cannot decode it."""
        if not files:
            return []
        whole = self._try_to_decode(files)
        if whole is not None:
            return whole
        # One of them failed, and which is not said.
        images: list[Tensor | None] = []
        for file in files:
            image = self._try_to_decode([file])
            images.append(None if image is None else image[0])
        return images

    def _try_to_decode(self, files: list[Tensor]) -> list[Tensor] | None:
        try:
            return self.decoder.decode(files)
        # RuntimeErrors, too, which are no fault of a file.
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except (RuntimeError, ValueError):
            return None

    def _upright(self, image: Tensor | None, entry: Entry) -> Tensor | None:
        """The decoded image turned by its EXIF data; None if it is not what the file's header announces."""
        if image is None:
            return None
        if not self.decoder.turns:
            image = turned_upright(image, entry.orientation)
        expected = turned_upright(
            torch.empty(entry.shape, device="meta"), entry.orientation
        )
        return image if image.shape == expected.shape else None


def total(parts: Sequence[DecodedImages]) -> DecodedImages:
    """All of some parts together."""
    columns = zip(*parts, strict=True)
    return DecodedImages(*(sum(column) for column in columns))
