"""Samples → one batch, by the function that `data.collate` names instead of torch's `default_collate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import default_convert

from trainer.config.registry import resolve
from trainer.data.conversion import describe
from trainer.errors import ConfigError, DataError

Samples = list[tuple[Any, Any]]


def lists(samples: Samples) -> tuple[list[Any], list[Any]]:
    """Every sample as it is: a list of inputs and a list of targets, as detectors take them.

    Arrays, and lists of numbers within a target, become tensors.
    """
    inputs = []
    targets = []
    for sample_input, target in samples:
        inputs.append(_as_tensors(sample_input))
        targets.append(_as_tensors(target))
    return inputs, targets


COLLATES: Mapping[str, Callable[[Samples], Any]] = {"lists": lists}


class Collation:
    """`data.collate` as a function of samples. Loader processes receive it by pickle."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._function = _resolve(name)

    def __call__(self, samples: Samples) -> tuple[Any, Any]:
        """`(inputs, targets)` of one micro-batch. Raises `DataError` if the function returns anything else."""
        batch = self._function(samples)
        if isinstance(batch, tuple | list) and len(batch) == 2:
            inputs, targets = batch
            return inputs, targets
        raise DataError(
            f"data.collate={self.name} returned {describe(batch)}; return a pair (inputs, targets)"
        )


def build_collation(name: str | None) -> Collation | None:
    """What `data.collate` names; None for torch's default. Raises `ConfigError` if it is no function."""
    return None if name is None else Collation(name)


def _resolve(name: str) -> Callable[[Samples], Any]:
    try:
        function = resolve("data.collate", name, COLLATES)
    except ConfigError as error:
        raise ConfigError("data.collate", error.message) from None
    if isinstance(function, type) or not callable(function):
        kind = "a class" if isinstance(function, type) else type(function).__name__
        raise ConfigError(
            "data.collate",
            f'"{name}" is {kind}; name a function of a list of samples, [(input, target), …], that returns '
            f"(inputs, targets)",
        )
    return function  # type: ignore[no-any-return]


def _as_tensors(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_tensors(entry) for key, entry in value.items()}
    if _is_table(value):
        return torch.as_tensor(value)
    return default_convert(value)  # type: ignore[no-untyped-call]


def _is_table(value: Any) -> bool:
    """True for a list of numbers, or of such lists: boxes and labels as JSON holds them."""
    if not isinstance(value, list) or not value:
        return False
    first: Any = value[0]
    return isinstance(first, int | float) or _is_table(first)


def describe_ids(ids: Sequence[int], most: int = 4) -> str:
    """Some sample ids in a message."""
    shown = ", ".join(str(sample_id) for sample_id in ids[:most])
    return f"{shown}, …" if len(ids) > most else shown
