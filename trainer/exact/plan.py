"""Who runs what, in every step of every epoch: pure arithmetic on the config and the number of ranks.

A *step* takes `batch_size` samples of the epoch's permutation, the last step of an epoch what is left. It is
cut into `M = ceil(n / micro_size)` *micro-batches* of even size, and every rank runs a contiguous range of
them. Samples, order and micro-batches do not depend on the number of ranks; who runs them does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trainer.errors import ConfigError
from trainer.exact.seeding import numpy_generator

IndexRange = tuple[int, int]


def split_evenly(count: int, parts: int) -> list[IndexRange]:
    """Cut `range(count)` into `parts` contiguous ranges `(start, stop)`, sizes at most one apart, larger first.

    >>> split_evenly(8, 3)
    [(0, 3), (3, 6), (6, 8)]
    """
    size, larger = divmod(count, parts)
    bounds = [part * size + min(part, larger) for part in range(parts + 1)]
    return list(itertools.pairwise(bounds))


class Step(NamedTuple):
    """One optimizer update: the samples `[start, start + size)` of its epoch's permutation."""

    number: int  # steps done once this one is: what logs and checkpoints show
    epoch: int
    start: int
    size: int
    last_in_epoch: bool
    micro_batches: list[IndexRange]  # ranges within the step, in order
    ranks: list[IndexRange]  # each rank's range of micro-batches; empty for a rank with nothing to do
    has_idle_rank: bool  # as in a last step of fewer micro-batches than ranks

    @property
    def first_in_epoch(self) -> bool:
        return self.start == 0


@dataclass(frozen=True)
class Plan:
    """The plan of a run of `epochs` over `samples` samples, or of `max_steps` steps if that ends sooner.

    `equal_ranks` gives every rank the same number of micro-batches, at least one, by cutting a step finer (or
    coarser, where samples are too few): what statistics shared across ranks (SyncBatchNorm) need. Such a plan
    depends on `ranks`.
    """

    samples: int
    batch_size: int
    micro_size: int
    ranks: int
    epochs: int
    seed: int
    max_steps: int | None = None
    equal_ranks: bool = False
    _layouts: dict[int, tuple[list[IndexRange], list[IndexRange], bool]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        if self.micro_size > self.batch_size:
            raise ConfigError(
                "batch.micro_size", f"{self.micro_size} is more than batch.size={self.batch_size}; lower it"
            )
        largest = min(self.batch_size, self.samples)
        if not self.equal_ranks and self.ranks > self._cuts(largest):
            raise ConfigError(
                "batch.micro_size",
                f"{self.ranks} processes share {self._cuts(largest)} micro-batches a step "
                f"({largest} samples in micro-batches of {self.micro_size}), so some would never have work; "
                f"set batch.micro_size={max(1, largest // self.ranks)} or less, raise batch.size, "
                f"or start fewer processes",
            )
        shortest = self.samples - (self.steps_per_epoch - 1) * self.batch_size
        if self.equal_ranks and shortest < self.ranks:
            raise ConfigError(
                "batch_norm.mode",
                f"sync needs a sample for each of the {self.ranks} processes in every step, and the last step "
                f"of an epoch has {shortest}; change batch.size so that {self.samples} samples leave more, "
                f"or use batch_norm.mode=micro",
            )

    @cached_property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.samples / self.batch_size)

    @cached_property
    def total_steps(self) -> int:
        planned = self.epochs * self.steps_per_epoch
        return planned if self.max_steps is None else min(planned, self.max_steps)

    def step(self, done: int) -> Step:
        """The step that follows `done` earlier ones. Found at once: nothing before it is replayed."""
        epoch, in_epoch = divmod(done, self.steps_per_epoch)
        start = in_epoch * self.batch_size
        size = min(self.batch_size, self.samples - start)
        if size not in self._layouts:
            self._layouts[size] = self._layout(size)
        return Step(done + 1, epoch, start, size, in_epoch + 1 == self.steps_per_epoch, *self._layouts[size])

    def steps(self, done: int = 0) -> Iterator[Step]:
        """The run's steps after the first `done`."""
        return map(self.step, range(done, self.total_steps))

    def permutation(self, epoch: int) -> npt.NDArray[np.int64]:
        """The order of the sample ids in `epoch`, a function of the seed and the epoch alone."""
        return _permutation(self.seed, epoch, self.samples)

    def sample_ids(self, step: Step, micro_batch: int, last: int | None = None) -> npt.NDArray[np.int64]:
        """The sample ids of one micro-batch of `step`, in order, or of all from it to before `last`."""
        start, stop = step.micro_batches[micro_batch][0], step.micro_batches[(last or micro_batch + 1) - 1][1]
        return self.permutation(step.epoch)[step.start + start : step.start + stop]

    def groups(self, step: Step, rank: int, fuse: int) -> list[IndexRange]:
        """A rank's micro-batches of `step` in even ranges of at most `fuse` neighbours of one size."""
        groups: list[IndexRange] = []
        sizes = [stop - start for start, stop in step.micro_batches]
        for _, run in itertools.groupby(range(*step.ranks[rank]), key=sizes.__getitem__):
            first, *more = run
            count = 1 + len(more)
            groups += [(first + start, first + stop) for start, stop in split_evenly(count, math.ceil(count / fuse))]
        return groups

    def _cuts(self, size: int) -> int:
        return math.ceil(size / self.micro_size)

    def _layout(self, size: int) -> tuple[list[IndexRange], list[IndexRange], bool]:
        cuts = self._cuts(size)
        if self.equal_ranks:
            cuts = min(math.ceil(cuts / self.ranks), size // self.ranks) * self.ranks
        ranks = split_evenly(cuts, self.ranks)
        return split_evenly(size, cuts), ranks, any(start == stop for start, stop in ranks)


@lru_cache(maxsize=2)  # the loader runs ahead into the next epoch
def _permutation(seed: int, epoch: int, samples: int) -> npt.NDArray[np.int64]:
    return numpy_generator(seed, "order", epoch).permutation(samples)
