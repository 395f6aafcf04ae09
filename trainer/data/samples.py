"""Micro-batches on request, by sample id and epoch. Each sample's random draws are keyed by both."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from trainer.data.datasets import ImageArrays, MapDataset
from trainer.data.transforms import apply
from trainer.errors import DataError
from trainer.exact.plan import IndexRange
from trainer.exact.seeding import key, seed_cpu

Ids = npt.NDArray[np.int64]


class MicroBatch(NamedTuple):
    """The samples of one micro-batch, or of `fused` neighbouring ones of equal size that run in one forward."""

    first: int  # the index of the (first) micro-batch among those of its step
    inputs: Any
    targets: Any
    fused: int = 1

    @property
    def indices(self) -> IndexRange:
        """The indices of its micro-batches: the first, and the one past the last."""
        return self.first, self.first + self.fused


class Request(NamedTuple):
    """What a loader is asked for: the sample ids of one micro-batch, or of `fused` of them (see `MicroBatch`)."""

    first: int
    epoch: int
    ids: Ids
    fused: int = 1


class KeyedDataset(Dataset[Any]):
    """`Request` → `MicroBatch`, or a `DataError` for the caller to raise: it may come from another process.

    A sample's random draws are keyed by (seed, purpose, epoch, sample id): they are the same in any process and in any
    order, and new in each epoch.
    """

    def __init__(
        self,
        dataset: MapDataset,
        transform: Callable[..., Any] | None,
        *,
        seed: int,
        purpose: str,
    ) -> None:
        self.dataset = dataset
        self._transform = transform
        self._seed = seed
        self._purpose = purpose
        # In-memory data without transforms has nothing random: a micro-batch is one look-up.
        self._batch = (
            dataset.batch
            if isinstance(dataset, ImageArrays) and transform is None
            else None
        )
        self.draws = self._batch is None

    def __getitem__(self, request: Request) -> MicroBatch | DataError:
        if self._batch is not None:
            inputs, targets = self._batch(torch.from_numpy(request.ids))
            return MicroBatch(request.first, inputs, targets, request.fused)
        try:
            samples = [
                self.sample(request.epoch, sample_id)
                for sample_id in request.ids.tolist()
            ]
            inputs, targets = self._collate(samples)
        except DataError as error:
            return error
        return MicroBatch(request.first, inputs, targets, request.fused)

    def sample(self, epoch: int, sample_id: int) -> tuple[Any, Any]:
        """The input and target of one sample, transformed. It seeds the CPU's generators."""
        # All that a data set or transform may draw from; the caller restores the rank's generators (`draws`).
        seed_cpu(key(self._seed, self._purpose, epoch, sample_id))
        try:
            image, target = self.dataset[sample_id]
            return (
                (image, target)
                if self._transform is None
                else apply(self._transform, image, target)
            )
        except DataError:
            raise
        except Exception as error:
            # Anything: the data set and the transforms are other people's code.
            name, kind, line = (
                self._name(sample_id),
                type(error).__name__,
                _last_line(error),
            )
            raise DataError(f"{name}: {kind}: {error} ({line})") from error

    def _collate(self, samples: list[tuple[Any, Any]]) -> tuple[Any, Any]:
        try:
            inputs, targets = default_collate(samples)
        except (RuntimeError, TypeError) as error:
            shapes = {
                str(tuple(image.shape))
                for image, _ in samples
                if isinstance(image, Tensor)
            }
            reason = str(error).splitlines()[0]
            raise DataError(
                f"{self._purpose} samples do not fit into one batch (shapes {', '.join(sorted(shapes)) or 'unknown'}): "
                f"{reason}; set data.{self._purpose}_transforms to give all one shape"
            ) from error
        return inputs, targets

    def _name(self, sample_id: int) -> str:
        name = f"{self._purpose} sample {sample_id}"
        paths = getattr(self.dataset, "paths", None)
        return name if paths is None else f"{name} ({paths[sample_id]})"


def _last_line(error: BaseException) -> str:
    """Where an error was raised, as text: the traceback itself may not travel between processes."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}, line {frame.lineno}"
