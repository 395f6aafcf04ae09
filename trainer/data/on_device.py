"""`data.on_device`: all samples of a set as tensors on the device that trains. A batch is then a look-up there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from trainer.data.bad_samples import BadSample
from trainer.data.batches import Loaded, MicroBatch, Request, source_of
from trainer.data.conversion import describe
from trainer.data.samples import KeyedDataset
from trainer.errors import DataError
from trainer.process.activity import activity

KEY = "data.on_device"
CHUNK = 256  # samples that are read at once

SIGNED = {
    torch.uint16: torch.int16,
    torch.uint32: torch.int32,
    torch.uint64: torch.int64,
}

Load = Callable[[Iterable[Request]], Iterator[MicroBatch | Loaded]]


class DeviceSet:
    """The samples of `dataset`, after their transforms, on `device`. They are read once, when they are first needed."""

    def __init__(self, dataset: KeyedDataset, device: torch.device) -> None:
        self._dataset = dataset
        self._device = device
        self._tensors: tuple[Tensor, Tensor] | None = None
        self._bad: dict[int, BadSample] = {}

    def __len__(self) -> int:
        return len(self._dataset.dataset)

    def fill(self, load: Load) -> None:
        """Read all samples by `load`. Raises `DataError` where they do not have one shape."""
        if self._tensors is not None:
            return
        arrays = self._dataset.arrays
        if arrays is not None:
            self._tensors = (
                arrays.images.to(self._device),
                arrays.targets.to(self._device),
            )
            return
        requests = [
            Request(0, 0, np.arange(first, min(first + CHUNK, len(self))))
            for first in range(0, len(self), CHUNK)
        ]
        for item in load(requests):
            activity.go_on()
            self._keep(item)
        if self._tensors is None:
            raise next(iter(self._bad.values())).error()  # not one sample can be read

    def _keep(self, item: MicroBatch | Loaded) -> None:
        batch: MicroBatch | None
        if isinstance(item, Loaded):
            batch = item.batch
            for bad in item.bad:
                self._bad[bad.id] = bad
        else:
            batch = item
        if batch is None:
            return
        assert batch.source is not None
        parts = (batch.inputs, batch.targets)
        if self._tensors is None:
            self._tensors = self._empty(batch.inputs), self._empty(batch.targets)
        for whole, part in zip(self._tensors, parts, strict=True):
            if whole.shape[1:] != part.shape[1:] or whole.dtype != part.dtype:
                first = int(batch.source.ids[0])
                raise DataError(
                    f"{KEY}: {self._dataset.label} samples are not all alike: from sample {first} on there is "
                    f"{describe(part[0])}, and before {describe(whole[0])}; {_resize(self._dataset)}"
                )
            ids = batch.source.ids.to(self._device)
            _as_signed(whole)[ids] = _as_signed(part.to(self._device))

    def _empty(self, part: Tensor) -> Tensor:
        shape = (len(self), *part.shape[1:])
        return torch.zeros(shape, dtype=part.dtype, device=self._device)

    def request(self, request: Request) -> MicroBatch | Loaded:
        """What there is of a request, without its tensors: `take` finds them, once the ids are on the device."""
        bad: list[BadSample] = []
        if self._bad:
            bad = [self._bad[i] for i in request.ids.tolist() if i in self._bad]
            request = request.only([i not in self._bad for i in request.ids.tolist()])
        batch = MicroBatch(
            request.first,
            None,
            None,
            request.fused,
            samples=len(request.ids),
            source=source_of(request),
        )
        if not self._dataset.leaves_out:
            return batch
        return Loaded(batch if len(request.ids) else None, request, bad)

    def take(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of some samples, by int64 ids `(B,)` on the device."""
        assert self._tensors is not None, "it was filled when the ids were asked for"
        inputs, targets = self._tensors
        return _rows(inputs, ids), _rows(targets, ids)


def _rows(whole: Tensor, ids: Tensor) -> Tensor:
    return _as_signed(whole).index_select(0, ids).view(whole.dtype)


def _as_signed(tensor: Tensor) -> Tensor:
    """The same bytes as signed numbers: of wide unsigned ones, torch can hardly do more than copy them."""
    return tensor.view(SIGNED.get(tensor.dtype, tensor.dtype))


def _resize(dataset: KeyedDataset) -> str:
    """What to do about samples of several shapes."""
    return (
        f"set {dataset.transforms_key} to give all one shape, as {{name: Resize, size: [256, 256]}} does, or leave "
        f"{KEY} out"
    )
