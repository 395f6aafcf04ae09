"""Who runs what, in every step of every epoch: pure arithmetic on the config and the number of ranks.

A *step* takes `batch_size` samples of the epoch's order; the last step of an epoch takes what is left. Its n samples
are divided evenly into `M = ceil(n / micro_size)` *micro-batches*, and every rank runs a contiguous range of them.
Samples, order and micro-batches do not depend on the number of ranks; who runs them does.

The order of an epoch is a permutation of all samples, unless an `Order` chooses others. A sample that comes more than
once in an epoch is told apart by its *occurrence*: how many earlier places of the epoch's order hold it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from trainer.errors import ConfigError
from trainer.exact.seeding import numpy_generator

IndexRange = tuple[int, int]  # the first index, and the one past the last
Ids = npt.NDArray[np.int64]


def split_evenly(count: int, parts: int) -> list[IndexRange]:
    """Divide `range(count)` into `parts` contiguous ranges, sizes at most one apart, larger ones first.

    >>> split_evenly(8, 3)
    [(0, 3), (3, 6), (6, 8)]
    """
    size, larger = divmod(count, parts)
    bounds = []
    for part in range(parts + 1):
        larger_before = min(part, larger)
        bounds.append(part * size + larger_before)
    return list(itertools.pairwise(bounds))


class Layout(NamedTuple):
    """How the samples of a step are divided. It depends on their number alone, so a run has two of them at most."""

    micro_batches: list[IndexRange]  # ranges of samples within the step, in order
    # Each rank's range of micro-batches; empty for a rank with nothing to do.
    ranks: list[IndexRange]
    has_idle_rank: bool  # as in a last step of fewer micro-batches than ranks


class Step(NamedTuple):
    """One optimizer update: the samples `[start, start + size)` of its epoch's permutation."""

    number: int  # counted from 1: what logs and checkpoints show
    epoch: int  # counted from 0
    start: int
    size: int
    last_in_epoch: bool
    micro_batches: list[IndexRange]  # these three as in `Layout`
    ranks: list[IndexRange]
    has_idle_rank: bool
    # Which of its samples cannot be read, as places among all of them; the other fields are about those that remain.
    left_out: tuple[int, ...] = ()

    @property
    def first_in_epoch(self) -> bool:
        return self.start == 0


class Order(Hashable, Protocol):
    """Which samples an epoch takes, in which order: a pure function of the epoch, the same on every rank."""

    @property
    def samples(self) -> int:
        """The number of ids of every epoch."""

    def ids(self, epoch: int) -> Ids:
        """The sample ids of `epoch`, in order; one may come several times, and another not at all."""


@dataclass(frozen=True)
class Plan:
    """The plan of a run of `epochs` of `samples` samples each, or of `max_steps` steps if that ends sooner.

    An `order` chooses the samples of an epoch; without one each epoch is a permutation of all.

    `equal_ranks` gives every rank the same number of micro-batches, at least one, by making them smaller (or larger,
    where samples are too few): what statistics shared across ranks (SyncBatchNorm) need. Such a plan depends on
    `ranks`.

    Raises `ConfigError` where some rank would have nothing to do in every step.
    """

    samples: int
    batch_size: int
    micro_size: int
    ranks: int
    epochs: int
    seed: int
    max_steps: int | None = None
    equal_ranks: bool = False
    order: Order | None = None
    _layouts: dict[int, Layout] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.micro_size > self.batch_size:
            raise ConfigError(
                "batch.micro_size",
                f"{self.micro_size} is more than batch.size={self.batch_size}; lower it",
            )
        if self.equal_ranks:
            self._refuse_too_few_samples()
        else:
            self._refuse_idle_ranks()

    def _refuse_idle_ranks(self) -> None:
        largest = min(self.batch_size, self.samples)
        micro_batches = self._count_micro_batches(largest)
        if self.ranks > micro_batches:
            fitting = max(1, largest // self.ranks)
            raise ConfigError(
                "batch.micro_size",
                f"{self.ranks} processes share {micro_batches} micro-batches a step "
                f"({largest} samples in micro-batches of {self.micro_size}), so some would never have work; "
                f"set batch.micro_size={fitting} or less, raise batch.size, "
                f"or start fewer processes",
            )

    def _refuse_too_few_samples(self) -> None:
        full_steps = self.steps_per_epoch - 1
        shortest = self.samples - full_steps * self.batch_size
        if shortest < self.ranks:
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
        if self.max_steps is None:
            return planned
        return min(planned, self.max_steps)

    def step(self, index: int) -> Step:
        """The step after `index` others: a look-up, for which no earlier step is needed."""
        epoch, index_in_epoch = divmod(index, self.steps_per_epoch)
        start = index_in_epoch * self.batch_size
        size = min(self.batch_size, self.samples - start)
        layout = self._layouts.get(size)
        if layout is None:
            layout = self._layouts[size] = self._layout(size)
        is_last = index_in_epoch + 1 == self.steps_per_epoch
        return Step(index + 1, epoch, start, size, is_last, *layout)

    def step_size(self, index: int) -> int:
        """The number of samples of the step after `index` others."""
        start = index % self.steps_per_epoch * self.batch_size
        return min(self.batch_size, self.samples - start)

    def steps(self, first: int = 0, end: int | None = None) -> Iterator[Step]:
        """The run's steps without the first ones, as many as `first` says, up to step number `end` if it is given."""
        stop = self.total_steps if end is None else end
        return map(self.step, range(first, stop))

    def permutation(self, epoch: int) -> Ids:
        """The sample ids of `epoch` in order: a permutation of all, or what `order` chooses."""
        if self.order is None:
            return _permutation(self.seed, epoch, self.samples)
        return _chosen(self.order, epoch).ids

    def sample_ids(self, step: Step, first: int, end: int | None = None) -> Ids:
        """The sample ids of micro-batch `first` of `step`, in order, or of all micro-batches `[first, end)`."""
        return _cut(self.permutation(step.epoch), step, first, end)

    def ids_of_steps(self, steps: range) -> Ids:
        """The sample ids of all steps with these 0-based numbers, in order: what `sample_ids` gives, joined."""
        ids = []
        first = steps.start
        while first < steps.stop:
            epoch, index_in_epoch = divmod(first, self.steps_per_epoch)
            end_in_epoch = index_in_epoch + steps.stop - first
            start = index_in_epoch * self.batch_size
            # Perhaps past the epoch's end, where the slice ends.
            end = end_in_epoch * self.batch_size
            ids.append(self.permutation(epoch)[start:end])
            first = (epoch + 1) * self.steps_per_epoch
        return ids[0] if len(ids) == 1 else np.concatenate(ids)

    def occurrences(self, step: Step, first: int, end: int | None = None) -> Ids | None:
        """The occurrence of each of these samples within its epoch; None where no sample of the epoch comes twice."""
        if self.order is None:
            return None
        occurrences = _chosen(self.order, step.epoch).occurrences
        if occurrences is None:
            return None
        return _cut(occurrences, step, first, end)

    def groups(self, step: Step, rank: int, fuse: int) -> list[IndexRange]:
        """A rank's micro-batches of `step` in even ranges of at most `fuse` neighbours of one size."""
        sizes = [stop - start for start, stop in step.micro_batches]
        groups: list[IndexRange] = []
        own = range(*step.ranks[rank])
        for _, neighbours in itertools.groupby(own, key=sizes.__getitem__):
            indices = list(neighbours)
            count = math.ceil(len(indices) / fuse)
            for start, stop in split_evenly(len(indices), count):
                groups.append((indices[start], indices[stop - 1] + 1))
        return groups

    def _count_micro_batches(self, samples: int) -> int:
        return math.ceil(samples / self.micro_size)

    def _layout(self, samples: int) -> Layout:
        count = self._count_micro_batches(samples)
        if self.equal_ranks:
            even_share = math.ceil(count / self.ranks)
            most = samples // self.ranks  # so that none is empty
            count = min(even_share, most) * self.ranks
        return Layout(
            micro_batches=split_evenly(samples, count),
            ranks=split_evenly(count, self.ranks),
            has_idle_rank=count < self.ranks,
        )


def _cut(in_order: Ids, step: Step, first: int, end: int | None) -> Ids:
    """Of the values for each place of an epoch's order, those of the step's micro-batches."""
    last = first if end is None else end - 1
    start, _ = step.micro_batches[first]
    _, stop = step.micro_batches[last]
    if step.left_out:
        planned_size = step.size + len(step.left_out)
        planned = in_order[step.start : step.start + planned_size]
        remaining = np.delete(planned, step.left_out)
        return remaining[start:stop]
    return in_order[step.start + start : step.start + stop]


class _Chosen(NamedTuple):
    ids: Ids
    occurrences: Ids | None


# The loader runs ahead into the next epoch.
@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, samples: int) -> Ids:
    return numpy_generator(seed, "order", epoch).permutation(samples)


@lru_cache(maxsize=2)
def _chosen(order: Order, epoch: int) -> _Chosen:
    ids = order.ids(epoch)
    return _Chosen(ids, count_occurrences(ids))


def count_occurrences(ids: Ids) -> Ids | None:
    """For each id, how many earlier places hold it; None where all are 0.

    >>> count_occurrences(np.array([7, 5, 7, 7])).tolist()
    [0, 0, 1, 2]
    """
    by_id = np.argsort(ids, kind="stable")
    in_order = ids[by_id]
    is_first = np.ones(len(ids), dtype=bool)
    is_first[1:] = in_order[1:] != in_order[:-1]
    if is_first.all():
        return None
    places = np.arange(len(ids))
    # Of the run of equal ids that each place is in.
    starts = np.where(is_first, places, 0)
    first_place = np.maximum.accumulate(starts)
    occurrences = np.empty(len(ids), dtype=np.int64)
    occurrences[by_id] = places - first_place
    return occurrences
