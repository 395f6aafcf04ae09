"""Sums on the device, read by the host at log intervals only."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trainer.components.task import Task, WeightedSum, metrics_add_up
from trainer.core.forward import count_samples
from trainer.core.misfit import explained
from trainer.core.separate_sums import Scalar, SeparateSums
from trainer.data.batches import MicroBatch
from trainer.errors import ConfigError
from trainer.exact.structures import map_tensors, part_of
from trainer.process.device import sum_dtype
from trainer.process.ranks import Ranks
from trainer.storage.checkpoint import Progress

Row = dict[str, float]  # one logged row
TIMINGS = ("samples_per_second", "data_wait")  # columns that depend on the hardware
# Of outputs that wait to be measured: bounds their memory.
MAX_WAITING_ELEMENTS = 1 << 22


class Stopwatch:
    """Seconds of training, those of earlier sessions included, and the pace since the last mark."""

    def __init__(self, progress: Progress) -> None:
        self._start = time.monotonic() - progress.seconds
        self.mark(progress.samples_seen)

    def mark(self, samples_seen: int) -> None:
        """Start an interval."""
        self._interval_start = time.monotonic()
        self._samples_at_start = samples_seen

    def pace(self, samples_seen: int, waited: float) -> Row:
        """Samples per second since the last mark, and the share of that time spent waiting for data (`waited` s).

        Both by the host's clock. On a GPU the host queues work ahead, so it may wait for data while the GPU is busy.
        """
        # Never 0, which is what a coarse clock says of a short interval.
        seconds = max(time.monotonic() - self._interval_start, 1e-9)
        samples = samples_seen - self._samples_at_start
        self.mark(samples_seen)
        return {
            "samples_per_second": samples / seconds,
            "data_wait": min(1.0, waited / seconds),
        }

    def stop(self, progress: Progress) -> None:
        """Write the seconds of training so far into the run's progress."""
        progress.seconds = time.monotonic() - self._start


# A sum and its weight, each as floats that add up to it exactly.
ExactSum = tuple[list[float], list[float]]


class Totals:
    """Sums and their weights, by name, on the host. They are exact, so neither order nor grouping changes them.

    Each is an expansion of non-overlapping floats (Shewchuk, 1997, "Adaptive precision floating-point arithmetic"),
    as within `math.fsum`, and is rounded once, when it is read. `sums` are plain values, which JSON preserves.
    """

    def __init__(self, sums: Mapping[str, ExactSum] | None = None) -> None:
        self.sums: dict[str, ExactSum] = {}
        for name, (total, weight) in (sums or {}).items():
            self.sums[name] = list(total), list(weight)  # JSON gives lists of both

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
        """Sum ÷ weight of every name with a non-zero weight: where every target is ignored, there is no loss."""
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
        larger, smaller = value, part
        if abs(smaller) >= abs(larger):
            larger, smaller = part, value
        value = larger + smaller
        error = smaller - (value - larger)
        if error:
            expansion[errors] = error
            errors += 1
    expansion[errors:] = [value]


OutputAndTargets = tuple[Any, Any]


class Meter:
    """The loss and metrics of many micro-batches, summed in fp64 on the device.

    `add` only stores references. Outputs are measured together, many micro-batches at a time, because a few small
    operations for each would cost more than a layer of a small net. That is for metrics that say so
    (`Task.metrics_add_up`): others may compare samples, and see one micro-batch at a time, as the loss does, or one
    batch of an evaluation. If the sums must be `exact`, the same on any number of ranks to the last bit, each
    micro-batch is measured by itself and the host adds them up.
    """

    def __init__(self, task: Task, ranks: Ranks, *, exact: bool = False) -> None:
        self._task = task
        self._ranks = ranks
        self._joins = metrics_add_up(task)
        self._names = ("loss", *task.metrics)
        self._dtype = sum_dtype(ranks.device)
        shape = (len(self._names), 2)  # a total and a weight each
        self._sums = torch.zeros(shape, dtype=self._dtype, device=ranks.device)
        # Views of the single numbers, made once: `sums[0, 0] += …` takes four operations.
        self._cells = self._sums.view(-1).unbind()
        self._separate: SeparateSums | None = None
        if exact:
            self._separate = SeparateSums(self._dtype, ranks.device)
        self._clear()

    def add(self, batch: MicroBatch, output: Any, loss: WeightedSum) -> None:
        """Count one micro-batch: its loss now, its metrics later."""
        if loss.total.requires_grad:
            loss = WeightedSum(loss.total.detach(), loss.weight)
        self._losses.append(loss)
        output = detach(output)
        if self._joins or batch.fused == 1:
            self._outputs.append((output, batch.targets))
        else:
            self._outputs += split_by_micro_batch(output, batch)
        if isinstance(output, Tensor):
            self._elements += output.numel()
        else:
            # Its size is unknown, so it does not wait.
            self._elements += MAX_WAITING_ELEMENTS
        if self._elements >= MAX_WAITING_ELEMENTS:
            self.flush()

    def mark(self) -> Callable[[], None]:
        """A function that forgets all that is added after this call. What waits is measured now."""
        self.flush()
        sums = self._sums.clone()
        separate = None if self._separate is None else self._separate.copy()

        def forget() -> None:
            self._clear()
            self._sums.copy_(sums)
            self._separate = separate

        return forget

    def read(self) -> Totals:
        """All that was added since the last read, summed over all ranks. A collective; waits for the device."""
        self.flush()
        totals = Totals()
        for sums in self._sums_of_all_ranks():
            totals_of_row, weights_of_row = sums[::2], sums[1::2]
            for name, total, weight in zip(
                self._names, totals_of_row, weights_of_row, strict=True
            ):
                totals.count(name, total, weight)
        return totals

    def _sums_of_all_ranks(self) -> list[list[float]]:
        """Rows of a total and its weight for each name, of all ranks, on the host. Nothing is kept."""
        if self._separate is not None:
            rows = self._separate.read()
            self._separate = SeparateSums(self._dtype, self._ranks.device)
            return self._ranks.gather(rows)
        sums = self._ranks.sum_(self._sums).flatten().tolist()
        self._sums.zero_()
        return [sums]

    def _clear(self) -> None:
        self._losses: list[WeightedSum] = []
        self._outputs: list[OutputAndTargets] = []
        self._elements = 0

    @torch.no_grad()
    def flush(self) -> None:
        """Measure the outputs that wait."""
        if self._losses and self._separate is not None:
            self._separate.add(self._rows())
        elif self._losses:
            self._add_all()
        self._clear()

    def _rows(self) -> list[list[Scalar]]:
        """A total and its weight for each name, of every micro-batch that waits."""
        rows = []
        for loss, (output, targets) in zip(self._losses, self._outputs, strict=True):
            row: list[Scalar] = [*loss]
            with explained(self._task, "metric_sums", output, targets):
                for total, weight in self._metric_sums(output, targets):
                    row += [_scalar(total), _scalar(weight)]
            rows.append(row)
        return rows

    def _add_all(self) -> None:
        """Add what waits to `_sums`, `(1 + metrics, 2)`: the loss in the first row, then a row for each metric."""
        total_of_loss, *totals = self._cells[::2]
        weight_of_loss, *weights = self._cells[1::2]
        _add_losses(self._losses, total_of_loss, weight_of_loss)
        outputs = self._outputs
        if self._joins:
            outputs = _join_outputs(outputs)
        for output, targets in outputs:
            with explained(self._task, "metric_sums", output, targets):
                metrics = self._metric_sums(output, targets)
                for row, (total, weight) in enumerate(metrics):
                    totals[row].add_(total)
                    weights[row].add_(weight)

    def _metric_sums(
        self, output: Any, targets: Any
    ) -> Iterable[tuple[Tensor, Tensor | int]]:
        metrics = self._task.metric_sums(output, targets)
        self._check_names(metrics)
        return metrics.values()

    def _check_names(self, metrics: Mapping[str, object]) -> None:
        if tuple(metrics) != self._task.metrics:
            names = ", ".join(metrics)
            declared = ", ".join(self._task.metrics)
            raise ConfigError(
                "loss.name", f"metric_sums gives {names}; metrics declares {declared}"
            )


def _scalar(value: Tensor | float) -> Scalar:
    """The value, if it can be a sum or a weight."""
    if isinstance(value, Tensor) and value.dim():
        raise ValueError(
            f"a sum and its weight are numbers or 0-dim tensors, and one has the shape {tuple(value.shape)}"
        )
    return value


def _add_losses(losses: list[WeightedSum], total: Tensor, weight: Tensor) -> None:
    """Add all totals to `total`, and all weights to `weight`, the plain counts as one."""
    totals = []
    count = 0
    for of_batch, weight_of_batch in losses:
        totals.append(of_batch)
        if isinstance(weight_of_batch, Tensor):
            weight.add_(weight_of_batch)
        else:
            count += weight_of_batch
    total.add_(torch.stack(totals).sum(dtype=total.dtype))
    weight.add_(count)


def _join_outputs(outputs: list[OutputAndTargets]) -> list[OutputAndTargets]:
    """The same outputs and targets, joined along the samples if they are tensors of fitting shapes."""
    for output, targets in outputs:
        if not isinstance(output, Tensor) or not isinstance(targets, Tensor):
            return outputs
    all_outputs, all_targets = zip(*outputs, strict=True)
    try:
        joined = torch.cat(all_outputs)
        joined_targets = torch.cat(all_targets)
    except RuntimeError:
        # Of other shapes. It is left to torch to find: comparing them here takes longer than joining small tensors.
        return outputs
    return [(joined, joined_targets)]


def split_by_micro_batch(output: Any, batch: MicroBatch) -> list[OutputAndTargets]:
    """Outputs and targets of the micro-batches that ran in one forward, all of one size."""
    samples = count_samples(batch)
    parts = []
    for index in range(batch.fused):
        own = partial(part_of, index=index, count=batch.fused, samples=samples)
        parts.append((own(output), own(batch.targets)))
    return parts


def detach(output: Any) -> Any:
    """The output without its graph. Models may return tensors in any structure."""
    if isinstance(output, Tensor):
        return output.detach()
    return map_tensors(Tensor.detach, output)
