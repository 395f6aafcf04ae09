"""One metric over all samples of an evaluation, whose batches ran on several ranks.

Ranks have contiguous shares of the batches, and the config alone cuts these. So what is merged or joined in the order
of the ranks is in the order of the sample ids, and does not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from trainer.exact.seeding import preserved_generators
from trainer.exact.structures import map_tensors

Merge = Literal["sum", "max", "min", "list"]
State = dict[str, Any]
# What a metric's update is called with: by position, or by name.
Inputs = tuple[Any, ...] | Mapping[str, Any]


class Accumulator(Protocol):
    """Collects what one metric needs of this rank's batches; the main process computes the metric from all ranks'."""

    def begin(self) -> None:
        """Forget the batches before."""

    def add(self, inputs: Inputs) -> None:
        """Take the next batch of this rank."""

    def parts(self) -> list[Any]:
        """What this rank has collected, in order, on the host."""

    def compute(self, parts: list[Any]) -> Any:
        """The metric's result from the parts of all ranks, in rank order; there is at least one."""


def accumulator_of(metric: Any) -> Accumulator:
    """How `metric`, of torchmetrics, is computed: from its merged states where these are sums, extremes and lists."""
    _keep_from_syncing(metric)
    merges = _merges_of(metric)
    return KeptInputs(metric) if merges is None else MergedStates(metric, merges)


class MergedStates:
    """A metric whose states of single batches can be merged into those of all samples.

    Sums of whole numbers, and extremes, are the same in any order: they add up in the metric itself. Each batch's other
    states are kept, and merged in the order of the batches. Lists are joined.
    """

    def __init__(self, metric: Any, merges: Mapping[str, Merge]) -> None:
        self._metric = metric
        self._merges = merges
        self._adds_up = all(
            _is_exact(merge, metric._defaults[name]) for name, merge in merges.items()
        )
        self.begin()

    def begin(self) -> None:
        self._metric.reset()
        self._states: list[State] = []
        self._batches = 0

    def add(self, inputs: Inputs) -> None:
        self._batches += 1
        if self._adds_up:
            update(self._metric, inputs)
            return
        self._metric.reset()
        update(self._metric, inputs)
        self._states.append(self._state())

    def parts(self) -> list[State]:
        if self._adds_up and self._batches:
            return [self._state()]
        return self._states

    def _state(self) -> State:
        return {name: to_host(getattr(self._metric, name)) for name in self._merges}

    def compute(self, parts: list[State]) -> Any:
        with on_cpu(self._metric):
            for name, merge in self._merges.items():
                merged = _merged(merge, [state[name] for state in parts])
                setattr(self._metric, name, merged)
            # As if it had been updated: else it warns that it was not.
            self._metric._update_count = len(parts)
            self._metric._computed = None
            return self._metric.compute()


class KeptInputs:
    """Any other metric: its inputs are kept, and it is updated on the main process, once with all of them.

    Where the inputs of batches cannot be joined, it is updated batch by batch.
    """

    def __init__(self, metric: Any) -> None:
        self._metric = metric
        self._is_tried = False
        self.begin()

    def begin(self) -> None:
        self._metric.reset()
        self._inputs: list[Inputs] = []

    def add(self, inputs: Inputs) -> None:
        kept = to_host(inputs)
        if not self._is_tried:
            # What does not fit is said before training, and not at the end of its first evaluation.
            with on_cpu(self._metric), preserved_generators():
                update(self._metric, kept)
            self._is_tried = True
        self._inputs.append(kept)

    def parts(self) -> list[Inputs]:
        return self._inputs

    def compute(self, parts: list[Inputs]) -> Any:
        with on_cpu(self._metric):
            for inputs in joined(parts):
                update(self._metric, inputs)
            return self._metric.compute()


def update(metric: Any, inputs: Inputs) -> None:
    """Update `metric` with a batch."""
    if not isinstance(inputs, Mapping):
        metric.update(*inputs)
        return
    # One mapping serves all metrics: each takes what it, or the metric within a wrapper, has a parameter for.
    taken = dict(inputs)
    for part in _with_inner(metric):
        taken = part._filter_kwargs(**taken)
    metric.update(**taken)


def to_host(value: Any) -> Any:
    """A copy of every tensor in `value` on the host, without memory that it shares with others."""
    return map_tensors(lambda tensor: tensor.detach().to("cpu", copy=True), value)


@contextmanager
def on_cpu(metric: Any) -> Iterator[None]:
    """A context with the metric, forgotten, on the CPU, where what all ranks collected has room."""
    device = metric.device
    metric.to("cpu")
    metric.reset()
    try:
        yield
    finally:
        metric.to(device)
        metric.reset()


def joined(parts: list[Inputs]) -> list[Inputs]:
    """The inputs of all batches as one, if they are tensors of fitting shapes or lists; else as they are."""
    if isinstance(parts[0], Mapping):
        columns = [[part[name] for part in parts] for name in parts[0]]  # type: ignore[call-overload]
    else:
        columns = [list(column) for column in zip(*parts, strict=True)]
    wholes = [_joined_column(column) for column in columns]
    if any(whole is None for whole in wholes):
        return parts
    if isinstance(parts[0], Mapping):
        return [dict(zip(parts[0], wholes, strict=True))]
    return [tuple(wholes)]


def _joined_column(values: list[Any]) -> Any:
    """One input of all batches; None if it cannot be joined."""
    if all(isinstance(value, list) for value in values):
        return list(chain.from_iterable(values))
    kinds = set()
    for value in values:
        if not isinstance(value, Tensor) or not value.dim():
            return None
        kinds.add((value.shape[1:], value.dtype))
    return torch.cat(values) if len(kinds) == 1 else None


def _merged(merge: Merge, values: list[Any]) -> Any:
    if merge == "list":
        return list(chain.from_iterable(values))
    merged: Tensor = values[0]
    for value in values[1:]:
        if merge == "sum":
            merged = merged + value
        elif merge == "max":
            merged = torch.maximum(merged, value)
        else:
            merged = torch.minimum(merged, value)
    return merged


def _merges_of(metric: Any) -> dict[str, Merge] | None:
    """How each state is merged; None where one cannot be, or where an update needs the states of those before."""
    if metric.full_state_update or not metric._defaults or _holds_others(metric):
        return None
    merges: dict[str, Merge] = {}
    for name, default in metric._defaults.items():
        merge = _merge_of(metric._reductions[name], default)
        if merge is None:
            return None
        merges[name] = merge
    return merges


def _merge_of(reduction: Any, default: Any) -> Merge | None:
    from torchmetrics import utilities as known

    if isinstance(default, list):
        return "list" if reduction in (known.dim_zero_cat, None) else None
    # A sum that begins at another value would count it once for each batch.
    if reduction is known.dim_zero_sum and not default.any():
        return "sum"
    if reduction is known.dim_zero_max:
        return "max"
    return "min" if reduction is known.dim_zero_min else None


def _is_exact(merge: Merge, default: Any) -> bool:
    """True if merging rounds nothing, so that neither order nor grouping matters, and keeps only one value."""
    if merge == "list":
        return False
    return merge != "sum" or not default.is_floating_point()


def _holds_others(metric: Any) -> bool:
    """True for a wrapper: what is in the metrics within is no state of its own."""
    return len(_with_inner(metric)) > 1


def _with_inner(metric: Any) -> list[Any]:
    """The metric, then those within it."""
    from torchmetrics import Metric

    return [part for part in metric.modules() if isinstance(part, Metric)]


def _keep_from_syncing(metric: Any) -> None:
    """Only the main process computes, on everything: torchmetrics' own exchange would wait for the others."""
    for part in _with_inner(metric):
        part.sync_on_compute = False
        part.dist_sync_on_step = False
        part._to_sync = False


def with_precision(metric: Any, dtype: torch.dtype) -> None:
    """Let a metric's fractions be of `dtype`, as the run's are; its counts stay whole numbers."""
    for part in _with_inner(metric):
        defaults = dict(part._defaults)
        part.set_dtype(dtype)
        for name, default in defaults.items():
            if isinstance(default, Tensor) and not default.is_floating_point():
                part._defaults[name] = default
        part.reset()
