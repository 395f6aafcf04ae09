"""Micro-batches on request: loaded here or in loader processes, copied ahead, normalised on the device."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch.utils.data._utils.pin_memory import pin_memory  # what a DataLoader pins with

from trainer.config.data_section import DataConfig
from trainer.data.batch_transforms.base import BatchTransforms
from trainer.data.batch_transforms.build import build_batch_transforms
from trainer.data.batches import Loaded, MicroBatch, Request
from trainer.data.collation import build_collation
from trainer.data.datasets import Datasets, MapDataset
from trainer.data.device_decoders import file_decoder
from trainer.data.device_decoding import DeviceDecoding, check_decoding
from trainer.data.image_list import PackedImages
from trainer.data.normalize import Normalize
from trainer.data.on_device import DeviceSet
from trainer.data.samples import KeyedDataset
from trainer.data.stand_ins import load_with_stand_ins
from trainer.data.transforms import build_transforms
from trainer.data.workers import load_in_workers
from trainer.errors import DataError
from trainer.exact.plan import Ids
from trainer.exact.seeding import preserved_cpu_generators
from trainer.exact.structures import tensors_in
from trainer.process.device import KINDS_WITH_STREAMS, device_module

# What else makes one size of images of several.
WITHOUT_DEVICE_SET = (
    ", or leave data.on_device out, without which data.batch_transforms do so"
)
BY_BATCH_TRANSFORMS = (
    ", or let data.batch_transforms begin with {name: RandomResizedCrop, size: 224} or "
    "{name: Resize, size: [224, 224]}"
)

# What is done to what a data set gave, before it is used.
Finish = Callable[[MicroBatch | Loaded | DataError], MicroBatch | Loaded]


class Loader:
    """Loads the micro-batches of some requests, in order, onto the device.

    With `data.workers`, loader processes are started once for the whole run and read ahead across steps and epochs. A
    request carries its epoch, so no process can have a stale one. On a GPU the next micro-batch is copied from pinned
    memory, on a side stream, while the current one is computed.
    """

    def __init__(
        self,
        dataset: KeyedDataset,
        section: DataConfig,
        device: torch.device,
        normalize: Normalize,
        batch_transforms: BatchTransforms | None = None,
    ) -> None:
        self.dataset = dataset
        self._section = section
        self.device = device
        self.normalize = normalize
        self.leaves_out = dataset.leaves_out
        self.batch_transforms = batch_transforms
        self.device_set = DeviceSet(dataset, device) if section.on_device else None
        dataset.tells_source = section.on_device or batch_transforms is not None
        takes_several_sizes = (
            batch_transforms is not None and batch_transforms.takes_several_sizes
        )
        dataset.packs_images = (
            takes_several_sizes and not section.on_device and not section.collate
        )
        if takes_several_sizes and section.on_device:
            dataset.advice_on_sizes = WITHOUT_DEVICE_SET
        elif batch_transforms is not None and not takes_several_sizes:
            dataset.advice_on_sizes = BY_BATCH_TRANSFORMS
        # Of a sample that the run reads: what is looked at before training.
        self.first_id = 0

    def peek(
        self,
        ids: Sequence[int] | Ids,
        first: int = 0,
        fused: int = 1,
        *,
        epoch: int = 0,
        occurrences: Ids | None = None,
    ) -> MicroBatch:
        """Some samples as the model sees them in `epoch`, as one micro-batch."""
        request = Request(first, epoch, np.asarray(ids), fused, occurrences)
        batch: MicroBatch = send_to_device(
            self._take(request, self._decoded), self.device
        )
        if self.batch_transforms is not None:
            batch = self.transform_batch(batch)
        return batch._replace(inputs=self.normalize(batch.inputs), source=None)

    def fetch(
        self,
        ids: Sequence[int] | Ids,
        first: int = 0,
        fused: int = 1,
        *,
        epoch: int = 0,
        occurrences: Ids | None = None,
    ) -> MicroBatch:
        """The same as the host has it: after the transforms alone, not normalised; files where the device decodes."""
        request = Request(first, epoch, np.asarray(ids), fused, occurrences)
        return self._take(request, _raise_if_error)

    def _take(self, request: Request, finish: Finish) -> MicroBatch:
        """The micro-batch of a request, loaded in this process."""
        if self.leaves_out:
            return _batch_of(self._with_stand_ins(request, finish))
        return _batch_of(finish(self._read(request)))

    def sample(self, sample_id: int, epoch: int) -> tuple[Any, Any]:
        """A sample's input and target after the transforms alone, as in `epoch`."""
        with preserved_cpu_generators():
            return self.dataset.sample(epoch, sample_id)

    def draws_for(self, sample_id: int) -> bool:
        """True if fetching a sample draws random numbers on the host."""
        with preserved_cpu_generators():
            return self.dataset.draws_for(sample_id)

    def raw(self, sample_id: int) -> Any:
        """A sample's input as the data set returns it."""
        if self.leaves_out:
            request = Request(0, 0, np.array([sample_id]))
            item = self._with_stand_ins(request, _raise_if_error)
            sample_id = int(item.request.ids[0])
        with preserved_cpu_generators():
            return self.dataset.pair(sample_id)[0]

    def name_sample(self, sample_id: int) -> str:
        """What a message calls a sample: its number, and its path if it has one."""
        return self.dataset.name(sample_id)

    def run(self, requests: Iterable[Request]) -> Generator[MicroBatch, None, None]:
        """The micro-batches of `requests`, in order. Closing the generator ends its loader processes."""
        items: Iterator[Any] = self.load(requests)
        return self.place(map(_batch_of, items) if self.leaves_out else items)

    def load(self, requests: Iterable[Request]) -> Iterator[MicroBatch | Loaded]:
        """What the data set gives for each of `requests`, on the CPU: with `leaves_out`, also what is bad."""
        if self.device_set is None:
            return self._read_all(requests)
        self.device_set.fill(self._read_all)
        return map(self.device_set.request, requests)

    def load_here(self, request: Request) -> MicroBatch | Loaded:
        """The same for one request, in this process."""
        if self.device_set is None:
            return self._decoded(self._read(request))
        self.device_set.fill(self._read_all)
        return self.device_set.request(request)

    def _read_all(self, requests: Iterable[Request]) -> Iterator[MicroBatch | Loaded]:
        items = self._load_all(requests)
        return map(self.train_decoding, items) if self.dataset.reads_files else items

    def _load_all(self, requests: Iterable[Request]) -> Iterator[MicroBatch | Loaded]:
        if self._section.workers:
            return self._load_in_workers(requests)
        return map(self._read, requests)

    def _decoded(self, item: MicroBatch | Loaded | DataError) -> MicroBatch | Loaded:
        """A micro-batch without files: the device decodes them."""
        item = _raise_if_error(item)
        return self.decoding(item) if self.dataset.reads_files else item

    @cached_property
    def decoding(self) -> DeviceDecoding:
        """What decodes files on the device. Raises `ConfigError` where nothing does."""
        return DeviceDecoding(self.dataset, file_decoder(self.device), self.device)

    @cached_property
    def train_decoding(self) -> DeviceDecoding:
        """The same for what is asked for ahead: it counts this alone, and nothing that is looked at besides."""
        return DeviceDecoding(self.dataset, self.decoding.decoder, self.device)

    @property
    def device_decoder(self) -> str:
        """The name of what decodes files on the device; "" where the CPU does."""
        return self.decoding.decoder.name if self.dataset.reads_files else ""

    def _read(self, request: Request) -> MicroBatch | Loaded:
        """What the data set gives for one request, in this process."""
        with self.dataset.preserved_draws():
            batch = self.dataset[request]
        return _raise_if_error(batch)

    def place(self, batches: Iterator[MicroBatch]) -> Generator[MicroBatch, None, None]:
        """Loaded micro-batches on the device, normalised, each copied while the one before it is used."""
        if self.device.type in KINDS_WITH_STREAMS:
            # Loader processes pin what they load; they do not make look-ups on the device.
            is_pinned = self._section.workers and self.device_set is None
            batches = self._copy_ahead(batches if is_pinned else map(_pin, batches))
        elif self.device.type != "cpu":
            batches = self._copy(batches)
        if self.device_set is not None or self.batch_transforms is not None:
            batches = map(self.transform_batch, batches)
        # Not by a loop here, whose variables would hold the images as they were while they are trained on.
        yield from map(self._normalized, batches)

    def _normalized(self, batch: MicroBatch) -> MicroBatch:
        first, inputs, targets, fused, blend, samples, _ = batch
        # Without what Module.__call__ does for hooks: there are none.
        images = self.normalize.forward(inputs)
        return MicroBatch(first, images, targets, fused, blend, samples)

    @property
    def is_look_up(self) -> bool:
        """True if a micro-batch is one look-up in the host's memory, made in this process and used where it is."""
        is_here = not self._section.workers and self.device.type == "cpu"
        is_plain = not self.dataset.draws and self.batch_transforms is None
        return is_here and is_plain and not self.leaves_out

    def transform_batch(self, batch: MicroBatch) -> MicroBatch:
        """A batch on the device, looked up there if it has no inputs yet, after `data.batch_transforms`."""
        source = batch.source
        assert source is not None
        inputs, targets = batch.inputs, batch.targets
        if inputs is None:
            assert self.device_set is not None
            inputs, targets = self.device_set.take(source.ids)
        if isinstance(inputs, PackedImages):
            inputs = inputs.unpacked()
        if self.batch_transforms is not None:
            if self.dataset.keeps_channels_together:
                inputs = inputs.contiguous()  # a transform's sums may depend on it
            inputs = self.batch_transforms(inputs, source)
        return batch._replace(inputs=inputs, targets=targets)

    def _with_stand_ins(self, request: Request, finish: Finish) -> Loaded:
        def load(request: Request) -> Loaded:
            item = finish(self.dataset.load_readable(request))
            assert isinstance(item, Loaded), "the data set leaves out what is bad"
            return item

        count = len(self.dataset.dataset)
        with preserved_cpu_generators():
            return load_with_stand_ins(
                load, request, count=count, most=self._section.max_bad
            )

    def _load_in_workers(
        self, requests: Iterable[Request]
    ) -> Iterator[MicroBatch | Loaded]:
        batches = load_in_workers(
            self.dataset,
            requests,
            workers=self._section.workers,
            prefetch=self._section.prefetch,
            pin_memory=self.device.type in KINDS_WITH_STREAMS,
        )
        return map(_raise_if_error, batches)

    def _copy(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        for batch in batches:
            yield send_to_device(batch, self.device)

    def _copy_ahead(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """Copy each micro-batch, from pinned memory, before the one before it is yielded."""
        kind = device_module(self.device)
        stream = kind.Stream(self.device)
        previous: tuple[MicroBatch, torch.Event] | None = None
        for batch in batches:
            with kind.stream(stream):
                copy = send_to_device(batch, self.device, non_blocking=True)
                end_of_copy = stream.record_event()
            if previous is not None:
                yield _wait_for_copy(*previous, kind.current_stream())
            previous = copy, end_of_copy
        if previous is not None:
            yield _wait_for_copy(*previous, kind.current_stream())


def build_loaders(
    section: DataConfig,
    data: Datasets,
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Loader, Loader | None]:
    """The loaders of training and validation samples."""
    build = partial(build_loader, section, seed=seed, device=device, dtype=dtype)
    train = build(data.train, "train", section.train_transforms)
    if data.val is None:
        return train, None
    return train, build(data.val, "val", section.val_transforms)


def build_loader(
    section: DataConfig,
    dataset: MapDataset,
    purpose: str,
    transforms: list[dict[str, Any]],
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    label: str | None = None,
    transforms_key: str | None = None,
) -> Loader:
    """The loader of one set. Draws are keyed by `purpose`, train or val; messages go by `label` and `transforms_key`.

    Raises `ConfigError` for transforms or a `data.collate` that cannot be built.
    """
    collation = build_collation(section.collate)
    key = transforms_key or f"data.{purpose}_transforms"
    keyed = KeyedDataset(
        dataset,
        build_transforms(key, transforms),
        seed=seed,
        purpose=purpose,
        leaves_out=section.bad_samples == "quarantine",
        collation=collation,
        label=label,
        transforms_key=key,
    )
    batch_transforms = None
    if purpose == "train":
        batch_transforms = build_batch_transforms(
            section.batch_transforms, seed=seed, purpose=purpose, device=device
        )
        if section.decode == "device":
            check_decoding(section, dataset, batch_transforms)
            keyed.reads_files = True
    # Where nothing comes between, Normalize puts channels apart. A batch of another making may lie in memory as a user
    # means it.
    keyed.stacks_decoded = (
        collation is None and keyed.arrays is None and batch_transforms is None
    )
    normalize = Normalize(
        section.mean,
        section.std,
        dtype,
        structured=collation is not None or section.columns is not None,
        puts_channels_apart=keyed.keeps_channels_together,
    ).to(device)
    return Loader(keyed, section, device, normalize, batch_transforms)


def _raise_if_error(item: MicroBatch | Loaded | DataError) -> MicroBatch | Loaded:
    if isinstance(item, DataError):
        raise item
    return item


def _batch_of(item: MicroBatch | Loaded) -> MicroBatch:
    """The whole micro-batch. Raises `DataError` if a sample of it is bad: it has been left out before, or was not."""
    if isinstance(item, MicroBatch):
        return item
    if item.bad:
        raise item.bad[0].error()
    assert item.batch is not None, "nobody asks for no samples"
    return item.batch


def _pin(batch: MicroBatch) -> MicroBatch:
    """The batch in page-locked memory, from which it is copied without the host.

    With loader processes `DataLoader` does this itself, by the same function: every tensor in dicts, lists and tuples,
    and every object with a `pin_memory` of its own.
    """
    pinned: MicroBatch = pin_memory(batch)  # type: ignore[no-untyped-call]
    return pinned


def _wait_for_copy(
    batch: MicroBatch, end_of_copy: torch.Event, current: torch.Stream
) -> MicroBatch:
    """The batch, once the current stream may use it. The host does not wait."""
    current.wait_event(end_of_copy)
    for tensor in tensors_in((batch.inputs, batch.targets, batch.source)):
        # So that its memory is not reused before this stream is done with it.
        tensor.record_stream(current)
    return batch
