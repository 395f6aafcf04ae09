"""Samples as they are asked for: by place and epoch, their random draws keyed by who they are."""

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
    """Samples that are never split. `first` is its index among those of its step.

    Or `fused` of them, neighbours of one size, that are run in one forward: `first` is the index of the first one.
    """

    first: int
    inputs: Any
    targets: Any
    fused: int = 1

    @property
    def indices(self) -> IndexRange:
        return self.first, self.first + self.fused


class Request(NamedTuple):
    """What a loader is asked for: a micro-batch's index, its epoch, and its sample ids; or those of `fused` of them."""

    first: int
    epoch: int
    ids: Ids
    fused: int = 1


class KeyedDataset(Dataset[Any]):
    """`Request` → `MicroBatch`, or a `DataError` to be raised by whoever asked.

    A sample's random draws are keyed by (seed, purpose, epoch, sample id): they are the same in any process,
    in any order, and new in each epoch.
    """

    def __init__(self, dataset: MapDataset, transform: Callable[..., Any] | None, *, seed: int, purpose: str) -> None:
        self.dataset = dataset
        self._transform = transform
        self._seed = seed
        self._purpose = purpose
        # In-memory data without transforms has nothing random: a micro-batch is one look-up.
        self._batch = dataset.batch if isinstance(dataset, ImageArrays) and transform is None else None
        self.draws = self._batch is None

    def __getitem__(self, request: Request) -> MicroBatch | DataError:
        if self._batch is not None:
            return MicroBatch(request.first, *self._batch(torch.from_numpy(request.ids)), request.fused)
        try:
            samples = [self._sample(request.epoch, int(i)) for i in request.ids]
            return MicroBatch(request.first, *self._collate(samples), request.fused)
        except DataError as error:
            return error

    def _sample(self, epoch: int, sample_id: int) -> tuple[Any, Any]:
        seed_cpu(key(self._seed, self._purpose, epoch, sample_id))
        try:
            image, target = self.dataset[sample_id]
            return (image, target) if self._transform is None else apply(self._transform, image, target)
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{self._name(sample_id)}: {type(error).__name__}: {error} ({_place(error)})") from error

    def _collate(self, samples: list[tuple[Any, Any]]) -> tuple[Any, Any]:
        try:
            inputs, targets = default_collate(samples)
            return inputs, targets
        except (RuntimeError, TypeError) as error:
            shapes = sorted({str(tuple(image.shape)) for image, _ in samples if isinstance(image, Tensor)})
            raise DataError(
                f"{self._purpose} samples do not fit into one batch (shapes {', '.join(shapes) or 'unknown'}): "
                f"{str(error).splitlines()[0]}; set data.{self._purpose}_transforms to give all one shape"
            ) from error

    def _name(self, sample_id: int) -> str:
        paths = getattr(self.dataset, "paths", None)
        return f"{self._purpose} sample {sample_id}" + (f" ({paths[sample_id]})" if paths is not None else "")


def _place(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}, line {frame.lineno}"
