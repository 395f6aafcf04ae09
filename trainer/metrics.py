"""Sums on the device, read by the host at log intervals only."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from trainer.checkpoint import Progress
from trainer.distributed import Ranks
from trainer.errors import ConfigError
from trainer.task import Sum, Task

Row = dict[str, float]  # one logged row
HELD = 1 << 22  # elements of outputs kept back before they are summed


class Stopwatch:
    """Seconds of training, those of earlier sessions included, and samples per second since the last mark."""

    def __init__(self, progress: Progress) -> None:
        self._began = time.monotonic() - progress.seconds
        self.mark(progress.samples_seen)

    def mark(self, samples_seen: int) -> None:
        self._mark, self._samples = time.monotonic(), samples_seen

    def rate(self, samples_seen: int) -> float:
        rate = (samples_seen - self._samples) / max(time.monotonic() - self._mark, 1e-9)
        self.mark(samples_seen)
        return rate

    def stop(self, progress: Progress) -> None:
        """Write the seconds so far into the run's progress."""
        progress.seconds = time.monotonic() - self._began


class Totals:
    """Sums and what divides them, by name, on the host: exact over any number of ranks and intervals."""

    def __init__(self, sums: Mapping[str, tuple[float, float]] | None = None) -> None:
        self.sums = {name: (total, weight) for name, (total, weight) in (sums or {}).items()}

    def add(self, other: Totals) -> None:
        for name, (total, weight) in other.sums.items():
            mine = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = (mine[0] + total, mine[1] + weight)

    def means(self) -> dict[str, float]:
        """The mean of each; NaN where nothing was counted."""
        return {name: total / weight if weight else float("nan") for name, (total, weight) in self.sums.items()}


class Meter:
    """The loss and metrics of many micro-batches, summed in fp64 on the device.

    `add` only keeps references; outputs are measured together, many micro-batches at a time, because a
    handful of small operations for each would cost more than a small net's layer.
    """

    def __init__(self, task: Task, ranks: Ranks) -> None:
        self._task = task
        self._ranks = ranks
        self._names = ("loss", *task.metrics)
        self._dtype = torch.float32 if ranks.device.type == "mps" else torch.float64  # MPS has no fp64
        self._sums = self._zeros()
        self._clear()

    def add(self, loss: Tensor, weight: Tensor | int, output: Any, targets: Any) -> None:
        """Count one micro-batch: its loss sum, the weight of its targets, and what its metrics need."""
        self._losses.append((loss.detach(), weight))
        self._outputs.append((_detached(output), targets))
        self._held += output.numel() if isinstance(output, Tensor) else HELD
        if self._held >= HELD:
            self._fold()

    def read(self) -> Totals:
        """All that was added since the last read, over all ranks: one collective, one host sync."""
        self._fold()
        sums = self._ranks.sum_(self._sums).tolist()
        self._sums = self._zeros()
        return Totals({name: (total, weight) for name, (total, weight) in zip(self._names, sums, strict=True)})

    def _zeros(self) -> Tensor:
        return torch.zeros(len(self._names), 2, dtype=self._dtype, device=self._ranks.device)

    def _clear(self) -> None:
        self._losses: list[Sum] = []
        self._outputs: list[tuple[Any, Any]] = []
        self._held = 0

    @torch.no_grad()
    def _fold(self) -> None:
        """Sum what is held back."""
        if not self._losses:
            return
        for loss, weight in _added(self._losses):
            self._count(0, loss, weight)
        for output, targets in _joined(self._outputs):
            sums = self._task.metric_sums(output, targets)
            if tuple(sums) != self._task.metrics:
                raise ConfigError(
                    "loss.name",
                    f"metric_sums gives {', '.join(sums)}; metrics declares {', '.join(self._task.metrics)}",
                )
            for row, (total, weight) in enumerate(sums.values(), start=1):
                self._count(row, total, weight)
        self._clear()

    def _count(self, row: int, total: Tensor, weight: Tensor | int) -> None:
        self._sums[row, 0] += total
        self._sums[row, 1] += weight


def _added(losses: list[Sum]) -> Iterator[Sum]:
    """The same sums, those whose weight is a plain count as one."""
    yield (
        torch.stack([loss for loss, _ in losses]).sum(dtype=torch.float64),
        sum(weight for _, weight in losses if isinstance(weight, int)),
    )
    for _, weight in losses:
        if isinstance(weight, Tensor):
            yield weight.new_zeros(()), weight


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
