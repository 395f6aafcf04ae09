"""What loaders are asked for and what they give: a `Request` by sample id and epoch, and its `MicroBatch`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.data.bad_samples import BadSample
from trainer.exact.plan import Ids, IndexRange


class Source(NamedTuple):
    """Which samples a batch holds: what they are looked up and their draws are keyed by."""

    epoch: int
    ids: Tensor  # int64 `(B,)`
    occurrences: Tensor | None = None  # the same; None: none came before in its epoch


class MicroBatch(NamedTuple):
    """The samples of one micro-batch, or of `fused` neighbouring ones of equal size that run in one forward."""

    first: int  # the index of the (first) micro-batch among those of its step
    inputs: Any
    targets: Any
    fused: int = 1
    # How `train.mix` blended it, where it did (`trainer.core.mix.Blend`): the loss is of two targets for each sample.
    blend: Any = None
    samples: int | None = None  # how many there are, where that is known
    # Which samples they are, for what is looked up or drawn on the device; elsewhere None.
    source: Source | None = None

    @property
    def indices(self) -> IndexRange:
        """The indices of its micro-batches: the first, and the one past the last."""
        return self.first, self.first + self.fused


class Request(NamedTuple):
    """What a loader is asked for: the sample ids of one micro-batch, or of `fused` of them (see `MicroBatch`).

    `occurrences` says how often each sample came before in its epoch; None: it did not.
    """

    first: int
    epoch: int
    ids: Ids
    fused: int = 1
    occurrences: Ids | None = None

    def pairs(self) -> Iterator[tuple[int, int]]:
        """The id and the occurrence of each sample."""
        ids = self.ids.tolist()
        occurrences = (
            [0] * len(ids) if self.occurrences is None else self.occurrences.tolist()
        )
        return zip(ids, occurrences, strict=True)

    def only(self, positions: npt.ArrayLike) -> Request:
        """The same of the samples at `positions` alone: indices, or a mask."""
        kept = np.asarray(positions)
        if not kept.size:
            kept = kept.astype(np.int64)
        occurrences = self.occurrences
        return self._replace(
            ids=self.ids[kept],
            occurrences=None if occurrences is None else occurrences[kept],
        )


def source_of(request: Request) -> Source:
    """The samples of a request, as tensors."""
    occurrences = request.occurrences
    return Source(
        request.epoch,
        torch.from_numpy(request.ids),
        None if occurrences is None else torch.from_numpy(occurrences),
    )


class Loaded(NamedTuple):
    """What there is of a request: its readable part, as a `batch` (None if there is none), and the bad samples."""

    batch: MicroBatch | None
    request: Request
    bad: list[BadSample]
