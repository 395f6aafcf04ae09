"""Sums on the device, read by the host at log intervals only."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from trainer.components.task import Task, WeightedSum
from trainer.data.samples import MicroBatch
from trainer.errors import ConfigError
from trainer.process.ranks import Ranks
from trainer.storage.checkpoint import Progress

Row = dict[str, float]  # one logged row
TIMINGS = ("samples_per_second", "data_wait")  # columns that depend on the hardware
MOST_ELEMENTS = 1 << 22  # of outputs kept back before they are measured


class Stopwatch:
    """Seconds of training, those of earlier sessions included, and the pace since the last mark."""

    def __init__(self, progress: Progress) -> None:
        self._start = time.monotonic() - progress.seconds
        self.mark(progress.samples_seen)

    def mark(self, samples_seen: int) -> None:
        """Begin an interval."""
        self._interval_start = time.monotonic()
        self._samples_at_start = samples_seen

    def pace(self, samples_seen: int, waited: float) -> Row:
        """Samples per second, and the share of the time in which this process waited for data, `waited` seconds.

        Both by the host's clock. On a GPU the host queues work ahead, so it may wait for data while the GPU is busy.
        """
        seconds = max(time.monotonic() - self._interval_start, 1e-9)
        samples = samples_seen - self._samples_at_start
        self.mark(samples_seen)
        return {"samples_per_second": samples / seconds, "data_wait": min(1.0, waited / seconds)}

    def stop(self, progress: Progress) -> None:
        """Write the seconds so far into the run's progress."""
        progress.seconds = time.monotonic() - self._start


Exact = tuple[list[float], list[float]]  # a sum and its weight, each as floats that add up to it exactly


class Totals:
    """Sums and their weights, by name, on the host: exact, so that neither order nor grouping shows.

    Each is kept as an expansion of non-overlapping floats (Shewchuk, 1997, "Adaptive precision floating-point
    arithmetic"), as within `math.fsum`. It is rounded once, when it is read. Plain values, which JSON keeps.
    """

    def __init__(self, sums: Mapping[str, Exact] | None = None) -> None:
        self.sums: dict[str, Exact] = {}
        for name, (total, weight) in (sums or {}).items():
            self.sums[name] = list(total), list(weight)

    def count(self, name: str, total: float, weight: float) -> None:
        """Add one sum and its weight."""
        totals, weights = self.sums.setdefault(name, ([], []))
        _grow(totals, total)
        _grow(weights, weight)

    def add(self, other: Totals) -> None:
        """Add all sums of `other`."""
        for name, (other_totals, other_weights) in other.sums.items():
            totals, weights = self.sums.setdefault(name, ([], []))
            for value in other_totals:
                _grow(totals, value)
            for value in other_weights:
                _grow(weights, value)

    def means(self) -> dict[str, float]:
        """Sum ÷ weight of every name with a non-zero weight. Where every target was ignored, there is no loss."""
        means = {}
        for name, (totals, weights) in self.sums.items():
            weight = math.fsum(weights)
            if weight:
                means[name] = math.fsum(totals) / weight
        return means


def _grow(expansion: list[float], value: float) -> None:
    """Add `value` to an expansion without rounding: the error of each addition becomes a float of its own."""
    if not math.isfinite(value):
        expansion[:] = [value]
        return
    errors = 0
    for part in expansion.copy():
        larger, smaller = (value, part) if abs(value) > abs(part) else (part, value)
        value = larger + smaller
        error = smaller - (value - larger)
        if error:
            expansion[errors] = error
            errors += 1
    expansion[errors:] = [value]


class Meter:
    """The loss and metrics of many micro-batches, summed in fp64 on the device.

    `add` only keeps references. Outputs are measured together, many micro-batches at a time, because a handful of
    small operations for each would cost more than a small net's layer. Where the sums must be `exact`, the same on
    any number of ranks to the last bit, each micro-batch is measured by itself and the host adds up.
    """

    def __init__(self, task: Task, ranks: Ranks, *, exact: bool = False) -> None:
        self._task = task
        self._ranks = ranks
        self._exact = exact
        self._names = ("loss", *task.metrics)
        self._dtype = torch.float32 if ranks.device.type == "mps" else torch.float64  # MPS has no fp64
        self._sums: list[Tensor] = []
        self._clear()

    def add(self, batch: MicroBatch, output: Any, loss: WeightedSum) -> None:
        """Count one micro-batch: its loss, and what its metrics need."""
        self._losses.append(WeightedSum(loss.total.detach(), loss.weight))
        self._outputs.append((detached(output), batch.targets))
        self._elements += output.numel() if isinstance(output, Tensor) else MOST_ELEMENTS
        if self._elements >= MOST_ELEMENTS:
            self._flush()

    def read(self) -> Totals:
        """All that was added since the last read, over all ranks: one collective, one host sync."""
        self._flush()
        if self._exact:
            own_rows = torch.stack(self._sums).tolist() if self._sums else []
            rows = self._ranks.gather(own_rows)
        else:
            own_sums = self._sums[0] if self._sums else self._zeros()
            rows = [self._ranks.sum_(own_sums).tolist()]
        self._sums = []
        totals = Totals()
        for row in rows:
            for name, (total, weight) in zip(self._names, row, strict=True):
                totals.count(name, total, weight)
        return totals

    def _zeros(self) -> Tensor:
        return torch.zeros(len(self._names), 2, dtype=self._dtype, device=self._ranks.device)

    def _clear(self) -> None:
        self._losses: list[WeightedSum] = []
        self._outputs: list[tuple[Any, Any]] = []  # with their targets
        self._elements = 0

    @torch.no_grad()
    def _flush(self) -> None:
        """Measure and sum the outputs that are kept back."""
        if self._exact:
            for loss, output in zip(self._losses, self._outputs, strict=True):
                self._sums.append(self._measure(self._zeros(), [loss], [output]))
        elif self._losses:
            sums = self._sums[0] if self._sums else self._zeros()
            self._sums = [self._measure(sums, self._losses, self._outputs)]
        self._clear()

    def _measure(self, sums: Tensor, losses: list[WeightedSum], outputs: list[tuple[Any, Any]]) -> Tensor:
        """`sums`, `(1 + metrics, 2)`, a row for the loss and one for each metric, with some micro-batches added."""
        for total, weight in _combined(losses):
            sums[0, 0] += total
            sums[0, 1] += weight
        for output, targets in _joined(outputs):
            metrics = self._task.metric_sums(output, targets)
            if tuple(metrics) != self._task.metrics:
                declared = ", ".join(self._task.metrics)
                raise ConfigError("loss.name", f"metric_sums gives {', '.join(metrics)}; metrics declares {declared}")
            for row, (total, weight) in enumerate(metrics.values(), start=1):
                sums[row, 0] += total
                sums[row, 1] += weight
        return sums


def _combined(losses: list[WeightedSum]) -> Iterator[WeightedSum]:
    """The same sum in fewer operations: all totals with the plain counts as one, then each weight that is a tensor."""
    counts = sum(weight for _, weight in losses if isinstance(weight, int))
    total = torch.stack([total for total, _ in losses]).sum(dtype=torch.float64)
    yield WeightedSum(total, counts)
    for _, weight in losses:
        if isinstance(weight, Tensor):
            yield WeightedSum(weight.new_zeros(()), weight)


def _joined(outputs: list[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
    """The same outputs and targets, joined along the samples where they are tensors that fit together."""
    if not _fit_together(outputs):
        yield from outputs
        return
    yield torch.cat([output for output, _ in outputs]), torch.cat([targets for _, targets in outputs])


def _fit_together(outputs: list[tuple[Any, Any]]) -> bool:
    shapes = set()
    for output, targets in outputs:
        if not isinstance(output, Tensor) or not isinstance(targets, Tensor):
            return False
        shapes.add((output.shape[1:], targets.shape[1:]))
    return len(shapes) <= 1


def detached(output: Any) -> Any:
    """A model's output without its graph."""
    if isinstance(output, Tensor):
        return output.detach()
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, output)
