"""Micro-batches in plan order: fetched here or in loader processes, copied ahead, normalised on the device."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterable, Iterator, Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader

from trainer.config.schema import DataConfig
from trainer.data.datasets import Datasets, MapDataset
from trainer.data.samples import Ids, KeyedDataset, MicroBatch, Request
from trainer.data.transforms import build_transforms
from trainer.errors import ConfigError, DataError
from trainer.exact.plan import IndexRange, Plan, Step, split_evenly
from trainer.exact.seeding import preserved_cpu_generators


class Normalize(nn.Module):
    """Images on the device: uint8 scaled to [0, 1], cast to the run's dtype, `(x - mean) / std` by channel."""

    def __init__(self, mean: list[float] | None, std: list[float] | None, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self._shifts = mean is not None or std is not None
        self.scale: Tensor
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("scale", torch.tensor(1 / 255, dtype=dtype))
        self.register_buffer("mean", torch.tensor(mean or [0.0], dtype=dtype).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std or [1.0], dtype=dtype).view(-1, 1, 1))

    def forward(self, images: Any) -> Any:
        """`(N, C, H, W)` in, the same out; what is not a tensor of images passes untouched."""
        if not isinstance(images, Tensor):
            return images
        if images.dtype == torch.uint8:
            images = images * self.scale  # one operation casts and scales
        elif images.is_floating_point():
            images = images.to(self._dtype)
        if not self._shifts:
            return images
        self._check(images)
        return (images - self.mean) / self.std

    def _check(self, images: Tensor) -> None:
        if images.dim() < 3:
            raise ConfigError("data.mean", f"and data.std are for images, not for inputs of {tuple(images.shape)}")
        channels, means, deviations = images.shape[-3], len(self.mean), len(self.std)
        if not {means, deviations} <= {1, channels}:
            raise ConfigError(
                "data.mean", f"has {means} values and data.std has {deviations}, for images of {channels} channels"
            )

    def undo(self, images: Tensor) -> Tensor:
        """The images in [0, 1] again, on the CPU, to be looked at."""
        return (images * self.std + self.mean if self._shifts else images).float().clamp(0, 1).cpu()


class Loader:
    """The micro-batches of some requests, in order, on the device.

    With `workers`, the loader's processes are started once for the whole run and read ahead across steps and
    epochs; a request carries its epoch, so no process can hold a stale one. On CUDA the next micro-batch is
    copied, from pinned memory, on a side stream while the present one is computed.
    """

    def __init__(self, dataset: KeyedDataset, section: DataConfig, device: torch.device, normalize: Normalize) -> None:
        self._dataset = dataset
        self._section = section
        self._device = device
        self.normalize = normalize

    def peek(self, ids: Sequence[int] | Ids, first: int = 0, fused: int = 1) -> MicroBatch:
        """Some samples as the model sees them in the first epoch, fetched at once."""
        batch: MicroBatch = send_to_device(self.fetch(ids, first, fused), self._device)
        return batch._replace(inputs=self.normalize(batch.inputs))

    def fetch(self, ids: Sequence[int] | Ids, first: int = 0, fused: int = 1) -> MicroBatch:
        """The same as the transforms leave them: on the CPU, not normalised."""
        return next(self._here([Request(first, 0, np.asarray(ids), fused)]))

    def raw(self, sample_id: int) -> Any:
        """A sample's input as the data set gives it."""
        with preserved_cpu_generators():
            return self._dataset.dataset[sample_id][0]

    def run(self, requests: Iterable[Request]) -> Generator[MicroBatch, None, None]:
        """The micro-batches that are asked for, in order. Closing the generator ends its loader processes."""
        batches = self._in_workers(requests) if self._section.workers else self._here(requests)
        normalize = self.normalize.forward
        for first, inputs, targets, fused in self._copied_ahead(batches) if self._device.type != "cpu" else batches:
            yield MicroBatch(first, normalize(inputs), targets, fused)

    def _here(self, requests: Iterable[Request]) -> Iterator[MicroBatch]:
        for request in requests:
            if self._dataset.draws:
                with preserved_cpu_generators():
                    batch = self._dataset[request]
            else:
                batch = self._dataset[request]
            yield _checked(batch)

    def _in_workers(self, requests: Iterable[Request]) -> Iterator[MicroBatch]:
        return map(
            _checked,
            DataLoader(
                self._dataset,
                sampler=requests,
                batch_size=None,
                collate_fn=_as_is,
                num_workers=self._section.workers,
                prefetch_factor=self._section.prefetch,
                pin_memory=self._device.type == "cuda",
                worker_init_fn=_init_worker,
                generator=torch.Generator(),  # the loader seeds its workers; not from the run's generators
            ),
        )

    def _copied_ahead(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        if self._device.type != "cuda":
            yield from (send_to_device(batch, self._device) for batch in batches)
            return
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        ahead: tuple[MicroBatch, torch.cuda.Event] | None = None
        for batch in batches if self._section.workers else map(_pinned, batches):
            with torch.cuda.stream(stream):
                moved = send_to_device(batch, self._device, non_blocking=True)
                copied = stream.record_event()
            if ahead is not None:
                yield _received(*ahead)
            ahead = moved, copied
        if ahead is not None:
            yield _received(*ahead)


def build_loaders(
    section: DataConfig, data: Datasets, *, seed: int, device: torch.device, dtype: torch.dtype
) -> tuple[Loader, Loader | None]:
    """The loaders of training and validation samples."""
    normalize = Normalize(section.mean, section.std, dtype).to(device)

    def loader(dataset: MapDataset, purpose: str, items: list[dict[str, Any]]) -> Loader:
        transform = build_transforms(f"data.{purpose}_transforms", items)
        return Loader(KeyedDataset(dataset, transform, seed=seed, purpose=purpose), section, device, normalize)

    train = loader(data.train, "train", section.train_transforms)
    return train, None if data.val is None else loader(data.val, "val", section.val_transforms)


class TrainLoader:
    """A rank's micro-batches of every step, from the run's first step or any other, at most `fuse` at a time."""

    def __init__(self, loader: Loader, plan: Plan, rank: int, first_step: int, fuse: int = 1) -> None:
        self._plan = plan
        self._rank = rank
        self._fuse = fuse
        self._groups: dict[int, list[IndexRange]] = {}  # by a step's size
        self._batches = loader.run(self._requests(first_step))
        self._waited = 0.0

    def close(self) -> None:
        """End the loader processes."""
        self._batches.close()

    def take_waited(self) -> float:
        """Seconds in which the loop waited for a micro-batch since this was asked last, on the host's clock."""
        waited, self._waited = self._waited, 0.0
        return waited

    def step(self, step: Step) -> Iterator[MicroBatch]:
        """This rank's micro-batches of `step`; steps must be asked for in their order."""
        for first, last in self._grouped(step):
            asked = perf_counter()
            batch = next(self._batches)
            self._waited += perf_counter() - asked
            assert batch.indices == (first, last), "steps are taken in order"
            yield batch

    def _requests(self, first_step: int) -> Iterator[Request]:
        for step in self._plan.steps(first_step):
            for first, last in self._grouped(step):
                yield Request(first, step.epoch, self._plan.sample_ids(step, first, last), last - first)

    def _grouped(self, step: Step) -> list[IndexRange]:
        if step.size not in self._groups:
            self._groups[step.size] = self._plan.groups(step, self._rank, self._fuse)
        return self._groups[step.size]


def step_requests(plan: Plan, step: Step, rank: int) -> Iterator[Request]:
    """What `rank` runs of `step`, one micro-batch at a time."""
    for index in range(*step.ranks[rank]):
        yield Request(index, step.epoch, plan.sample_ids(step, index))


def whole_requests(samples: int, size: int, rank: int, ranks: int) -> Iterator[Request]:
    """A rank's share of all samples in order, each exactly once, `size` or fewer at a time."""
    parts = split_evenly(samples, -(-samples // size))
    for index in range(*split_evenly(len(parts), ranks)[rank]):
        yield Request(index, 0, np.arange(*parts[index]))


def _checked(batch: MicroBatch | DataError) -> MicroBatch:
    if isinstance(batch, DataError):
        raise batch
    return batch


def _pinned(batch: MicroBatch) -> MicroBatch:
    """What a loader process's batch is already: in memory that a copy can leave without the host's help."""
    inputs, targets = (part.pin_memory() if isinstance(part, Tensor) else part for part in batch[1:3])
    return batch._replace(inputs=inputs, targets=targets)


def _received(batch: MicroBatch, copied: torch.cuda.Event) -> MicroBatch:
    """The batch, safe to use on the current stream."""
    current = torch.cuda.current_stream()
    current.wait_event(copied)
    for part in (batch.inputs, batch.targets):
        if isinstance(part, Tensor):
            part.record_stream(current)
    return batch


def _as_is(batch: Any) -> Any:
    return batch


def _init_worker(_: int) -> None:
    """Out of the rank's process group: a signal to all of it is for the rank, which its loader must not leave first."""
    os.setpgrp()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the rank's own handler, which a fork inherits
    torch.set_num_threads(1)
