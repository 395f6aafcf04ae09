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
from trainer.errors import ConfigError
from trainer.process.ranks import Ranks
from trainer.storage.checkpoint import Progress

Row = dict[str, float]  # one logged row
TIMINGS = ("samples_per_second", "data_wait")  # columns that depend on the hardware
HELD = 1 << 22  # elements of outputs kept back before they are summed


class Stopwatch:
    """Seconds of training, those of earlier sessions included, and the pace since the last mark."""

    def __init__(self, progress: Progress) -> None:
        self._began = time.monotonic() - progress.seconds
        self.mark(progress.samples_seen)

    def mark(self, samples_seen: int) -> None:
        self._mark, self._samples = time.monotonic(), samples_seen

    def pace(self, samples_seen: int, waited: float) -> Row:
        """Samples per second, and the share of the time in which this process waited for data, `waited` seconds."""
        seconds = max(time.monotonic() - self._mark, 1e-9)
        row = {"samples_per_second": (samples_seen - self._samples) / seconds, "data_wait": min(1.0, waited / seconds)}
        self.mark(samples_seen)
        return row

    def stop(self, progress: Progress) -> None:
        """Write the seconds so far into the run's progress."""
        progress.seconds = time.monotonic() - self._began


Exact = tuple[list[float], list[float]]  # a sum and what divides it, each as floats that add up to it exactly


class Totals:
    """Sums and what divides them, by name, on the host: exact, so that neither order nor grouping shows.

    Each is held as an expansion of non-overlapping floats (Shewchuk, 1997, "Adaptive precision floating-point
    arithmetic"), as within `math.fsum`; it is rounded once, when it is read. Plain values, which JSON keeps.
    """

    def __init__(self, sums: Mapping[str, Exact] | None = None) -> None:
        self.sums: dict[str, Exact] = {name: (list(a), list(b)) for name, (a, b) in (sums or {}).items()}

    def count(self, name: str, total: float, weight: float) -> None:
        """Add one sum and its weight."""
        mine = self.sums.setdefault(name, ([], []))
        for expansion, value in zip(mine, (total, weight), strict=True):
            _grow(expansion, value)

    def add(self, other: Totals) -> None:
        for name, theirs in other.sums.items():
            mine = self.sums.setdefault(name, ([], []))
            for expansion, values in zip(mine, theirs, strict=True):
                for value in values:
                    _grow(expansion, value)

    def means(self) -> dict[str, float]:
        """The mean of each of which anything was counted; where every target was ignored, there is no loss."""
        rounded = {name: (math.fsum(total), math.fsum(weight)) for name, (total, weight) in self.sums.items()}
        return {name: total / weight for name, (total, weight) in rounded.items() if weight}


def _grow(expansion: list[float], value: float) -> None:
    """Add `value` without rounding: each two-sum leaves its error as a float of its own."""
    if not math.isfinite(value):
        expansion[:] = [value]
        return
    kept = 0
    for held in expansion.copy():
        larger, smaller = (value, held) if abs(value) > abs(held) else (held, value)
        value = larger + smaller
        error = smaller - (value - larger)
        if error:
            expansion[kept] = error
            kept += 1
    expansion[kept:] = [value]


class Meter:
    """The loss and metrics of many micro-batches, summed in fp64 on the device.

    `add` only keeps references; outputs are measured together, many micro-batches at a time, because a
    handful of small operations for each would cost more than a small net's layer. Where the sums must be `exact`,
    the same on any number of ranks to the last bit, each micro-batch is measured by itself and the host adds up.
    """

    def __init__(self, task: Task, ranks: Ranks, *, exact: bool = False) -> None:
        self._task = task
        self._ranks = ranks
        self._exact = exact
        self._names = ("loss", *task.metrics)
        self._dtype = torch.float32 if ranks.device.type == "mps" else torch.float64  # MPS has no fp64
        self._sums: list[Tensor] = []
        self._clear()

    def add(self, loss: Tensor, weight: Tensor | int, output: Any, targets: Any) -> None:
        """Count one micro-batch: its loss sum, the weight of its targets, and what its metrics need."""
        self._losses.append(WeightedSum(loss.detach(), weight))
        self._outputs.append((_detached(output), targets))
        self._held += output.numel() if isinstance(output, Tensor) else HELD
        if self._held >= HELD:
            self._fold()

    def read(self) -> Totals:
        """All that was added since the last read, over all ranks: one collective, one host sync."""
        self._fold()
        if self._exact:
            rows = self._ranks.gather(torch.stack(self._sums).tolist() if self._sums else [])
        else:
            rows = [self._ranks.sum_(self._sums[0] if self._sums else self._zeros()).tolist()]
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
        self._outputs: list[tuple[Any, Any]] = []
        self._held = 0

    @torch.no_grad()
    def _fold(self) -> None:
        """Sum what is held back."""
        if self._exact:
            for loss, output in zip(self._losses, self._outputs, strict=True):
                self._sums.append(self._measured(self._zeros(), [loss], [output]))
        elif self._losses:
            self._sums = [self._measured(self._sums[0] if self._sums else self._zeros(), self._losses, self._outputs)]
        self._clear()

    def _measured(self, sums: Tensor, losses: list[WeightedSum], outputs: list[tuple[Any, Any]]) -> Tensor:
        """`sums`, one row for the loss and one for each metric, with some micro-batches added."""
        for loss, weight in _added(losses):
            sums[0, 0] += loss
            sums[0, 1] += weight
        for output, targets in _joined(outputs):
            measured = self._task.metric_sums(output, targets)
            if tuple(measured) != self._task.metrics:
                declared = ", ".join(self._task.metrics)
                raise ConfigError("loss.name", f"metric_sums gives {', '.join(measured)}; metrics declares {declared}")
            for row, (total, weight) in enumerate(measured.values(), start=1):
                sums[row, 0] += total
                sums[row, 1] += weight
        return sums


def _added(losses: list[WeightedSum]) -> Iterator[WeightedSum]:
    """The same sums, those whose weight is a plain count as one."""
    yield WeightedSum(
        torch.stack([loss for loss, _ in losses]).sum(dtype=torch.float64),
        sum(weight for _, weight in losses if isinstance(weight, int)),
    )
    for _, weight in losses:
        if isinstance(weight, Tensor):
            yield WeightedSum(weight.new_zeros(()), weight)


def _joined(outputs: list[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
    """The same outputs and targets, joined along the samples where they are tensors that fit together."""
    plain = all(isinstance(output, Tensor) and isinstance(targets, Tensor) for output, targets in outputs)
    if not plain or len({(output.shape[1:], targets.shape[1:]) for output, targets in outputs}) > 1:
        yield from outputs
    else:
        yield torch.cat([output for output, _ in outputs]), torch.cat([targets for _, targets in outputs])


def _detached(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.detach()
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, output)
