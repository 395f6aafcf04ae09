"""What a step's micro-batches do with the norm layers that are in training mode when it begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from trainer.errors import ConfigError
from trainer.exact.norm_layer import EvalCalls, NormLayer


class Report(NamedTuple):
    """What one rank has seen: each layer's calls in a micro-batch, and who was called in eval mode all the same."""

    calls: list[int]
    read: set[str]
    uneven: str | None  # a layer that some micro-batches call more often


class Observation:
    """One step of `layers`, begun with the true statistics on every rank.

    With `is_compiled`, calls in eval mode are not seen: torch.compile would make the hooks part of its kernels.
    """

    def __init__(self, layers: list[NormLayer], *, is_compiled: bool) -> None:
        self.layers = layers
        self._starts = {}
        for layer in layers:
            mean, var = layer.buffers
            self._starts[layer.name] = mean.clone(), var.clone(), layer.counter.clone()
        self._eval_calls = EvalCalls([] if is_compiled else layers)
        self.uneven: str | None = None

    def end(self, moves: Mapping[NormLayer, int], count: int) -> Report | None:
        """After this rank's `count` micro-batches, of which a forward moved each layer's version by `moves`.

        None where the rank had nothing to do. Waits for the device.
        """
        read = self._eval_calls.end()
        if not count:
            return None
        calls = []
        for layer, has_changed in zip(self.layers, self._changes(), strict=True):
            layer.refuse_replaced_buffers()
            if moves[layer]:
                _, _, counter = self._starts[layer.name]
                calls.append(layer.count_calls(counter, moves[layer], count))
            else:
                # A layer of one's own may call torch's function without counting.
                calls.append(int(has_changed))
        return Report(calls, read, self.uneven)

    def subtract(self, layers: Sequence[NormLayer], count: int) -> None:
        """Leave only what this rank's `count` micro-batches have added to the statistics."""
        for layer in layers:
            mean, var, counter = self._starts[layer.name]
            remainder = layer.decay() ** count
            for buffer, start in zip(layer.buffers, (mean, var), strict=True):
                # What the rank's own updates have left of the start.
                buffer.sub_(start, alpha=remainder)
            layer.counter.sub_(counter)

    def _changes(self) -> list[bool]:
        """For each layer, whether its statistics are others than at the start."""
        differences = []
        for layer in self.layers:
            mean, var, _ = self._starts[layer.name]
            is_other = [
                (buffer != start).any()
                for buffer, start in zip(layer.buffers, (mean, var), strict=True)
            ]
            differences.append(is_other[0] | is_other[1])
        return torch.stack(differences).tolist()


def agree_on_calls(
    layers: Sequence[NormLayer], reports: Sequence[Report | None]
) -> list[int]:
    """Each layer's calls in a micro-batch, by the `reports` of all ranks; 0 for one that no rank trains.

    Raises `ConfigError` where ranks differ, or where a layer is trained and read in one step.
    """
    seen = [report for report in reports if report is not None]
    calls = seen[0].calls
    for report in seen:
        if report.uneven is not None:
            raise refuse_uneven_calls(report.uneven)
        for layer, first, other in zip(layers, calls, report.calls, strict=True):
            if first != other:
                raise refuse_uneven_calls(layer.name)
    for layer, count in zip(layers, calls, strict=True):
        if count and any(layer.name in report.read for report in seen):
            raise ConfigError(
                "run.reproducibility",
                f'norm layer "{layer.name}" is called in training and in eval mode in one step, so its running '
                f"statistics are read while they move, which several processes can do in bitwise mode alone; set "
                f"run.reproducibility=bitwise, or start one process",
            )
    return calls


def refuse_uneven_calls(name: str) -> ConfigError:
    """The error for a norm layer that some micro-batches update more often than others."""
    return ConfigError(
        "model",
        f'norm layer "{name}" is called more often in training mode in some micro-batches than in others, so its '
        f"running statistics would depend on the number of processes; call it equally often in each, or keep it in "
        f"eval mode while it is not trained",
    )
