"""Micro-batches of a set in memory, those of several steps by one look-up.

A look-up and a normalisation take hardly longer for a thousand small images than for sixty. So those of the next steps
are made at once, and cut into micro-batches. Each begins where a cache line begins, as a tensor of its own does: a
kernel may add in another order where it does not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainer.data.batches import MicroBatch
from trainer.data.datasets import ImageArrays
from trainer.data.loading import Loader
from trainer.data.train_loader import TrainLoader
from trainer.exact.plan import Ids, Plan, Step
from trainer.process.activity import COMPUTING, LOADING, activity

BYTES_AT_ONCE = 1 << 20
STEPS_AT_ONCE = 32
# Bytes; torch's own memory begins at a multiple of them, too. Kernels take other ways through tensors that do not.
CACHE_LINE = 64


class Cut(NamedTuple):
    """One forward of a step: its first micro-batch, how many of them run at once, and their samples."""

    first: int
    fused: int
    samples: int


class LookUpLoader(TrainLoader):
    """As `TrainLoader`, where `can_look_up` allows it."""

    def _open(self, first_step: int) -> None:
        self._next_step = first_step  # to be looked up
        self._steps_at_once = 1  # until the first look-up shows how large a step is
        # The micro-batches of each of the next steps, with its number.
        self._ready: deque[tuple[int, list[MicroBatch]]] = deque()
        self._cuts_by_size: dict[int, list[Cut]] = {}

    def close(self) -> None:
        """There is nothing to end: no process loads, and no file is open."""

    def peek(self) -> MicroBatch | None:
        if not self._ready:
            self._look_up()
        _, batches = self._ready[0]
        return batches[0] if batches else None

    def step(self, step: Step) -> Iterable[MicroBatch]:
        if not self._ready:
            self._look_up()
        number, batches = self._ready.popleft()
        assert number == step.number, "steps are taken in order"
        activity.mark(COMPUTING)
        return batches

    def _look_up(self) -> None:
        """Make the micro-batches of the next steps."""
        activity.mark(LOADING)
        start = perf_counter()
        end = min(self._next_step + self._steps_at_once, self._plan.total_steps)
        steps = range(self._next_step, end)
        self._next_step = end
        cuts_of_steps = [self._cuts(step) for step in steps]
        sizes = [cut.samples for cut in chain.from_iterable(cuts_of_steps)]
        # A rank may have nothing to do in all of these steps.
        parts = self._parts(self._ids(steps), sizes) if sizes else iter(())
        for step, cuts in zip(steps, cuts_of_steps, strict=True):
            batches = []
            for first, fused, samples in cuts:
                inputs, targets = next(parts)
                batch = MicroBatch(first, inputs, targets, fused, None, samples)
                batches.append(batch)
            self._ready.append((step + 1, batches))
        self._seconds_waited += perf_counter() - start

    def _ids(self, steps: range) -> Ids:
        """The ids of this rank's samples of the steps with these 0-based numbers, in order."""
        if self._plan.ranks == 1:
            return self._plan.ids_of_steps(steps)
        ids = []
        for index in steps:
            step = self._plan.step(index)
            first, end = step.ranks[self._rank]
            if end > first:
                ids.append(self._plan.sample_ids(step, first, end))
        return np.concatenate(ids)

    def _parts(self, ids: Ids, sizes: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets of the samples `ids`, cut into parts of these sizes."""
        inputs, targets = _look_up(self._loader, ids)
        sample_bytes = inputs.nbytes // len(inputs)
        steps = BYTES_AT_ONCE // (sample_bytes * _samples_of_step(self._plan))
        self._steps_at_once = min(steps, STEPS_AT_ONCE)
        # Not `split`: what a model writes to one part would count as a change of all.
        return zip(
            torch.unsafe_split_with_sizes(inputs, sizes),
            torch.unsafe_split_with_sizes(targets, sizes),
            strict=True,
        )

    def _cuts(self, index: int) -> list[Cut]:
        """What this rank runs of the step after `index` others."""
        size = self._plan.step_size(index)
        cuts = self._cuts_by_size.get(size)
        if cuts is None:
            step = self._plan.step(index)
            cuts = self._cuts_by_size[size] = []
            for first, end in self._groups(step):
                start, _ = step.micro_batches[first]
                _, stop = step.micro_batches[end - 1]
                cuts.append(Cut(first, end - first, stop - start))
        return cuts


def can_look_up(loader: Loader, plan: Plan) -> bool:
    """True for small images in the host's memory that no transform changes and that this process itself loads."""
    if not loader.is_look_up:
        return False
    inputs, _ = _look_up(loader, np.zeros(2, dtype=np.int64))
    sample_bytes = inputs[0].nbytes
    is_cut_by_lines = sample_bytes > 0 and sample_bytes % CACHE_LINE == 0
    fits = sample_bytes * _samples_of_step(plan) <= BYTES_AT_ONCE
    return inputs.is_contiguous() and is_cut_by_lines and fits


def _look_up(loader: Loader, ids: Ids) -> tuple[Tensor, Tensor]:
    """Normalised images and targets."""
    dataset = loader.dataset.dataset
    assert isinstance(dataset, ImageArrays)
    inputs, targets = dataset.batch(torch.from_numpy(ids))
    return loader.normalize(inputs), targets


def _samples_of_step(plan: Plan) -> int:
    return min(plan.batch_size, plan.samples)
