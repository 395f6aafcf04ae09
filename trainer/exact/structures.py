"""Tensors within what models and data sets return: dicts, lists, tuples, dataclasses and other objects."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import first_few

# Objects whose attributes are not looked at: they are no results.
OPAQUE = (type, nn.Module)
MOST_SHOWN = 6  # tensors, in a message


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A copy of `value` in which `function` replaces every tensor; `value` itself where no tensor is replaced.

    Mappings, lists, tuples and objects are copied, never changed, and keep their type.
    """
    return _map(function, value, frozenset())


def part_of(value: Any, index: int, *, count: int, samples: int | None) -> Any:
    """What of `value`, of `samples` samples, belongs to one of the `count` micro-batches of one size that gave it.

    Every tensor with a row for each sample is split; others belong to all micro-batches.
    """

    def part(tensor: Tensor) -> Tensor:
        if not samples or tensor.dim() == 0 or len(tensor) % samples:
            return tensor
        return tensor.chunk(count)[index]

    return map_tensors(part, value)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in `value`, in order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, value)
    yield from found


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` of `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def describe_tensors(value: Any) -> str:
    """The shape and dtype of a tensor, `(8, 3) float32`, or of those in a structure with the type of that."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {dtype_name(value.dtype)}"
    name = type(value).__name__
    parts = [describe_tensors(tensor) for tensor in tensors_in(value)]
    if not parts and isinstance(value, list | tuple):
        parts = sorted({type(item).__name__ for item in value})
    if not parts:
        return name
    return f"{name} of {first_few(parts, MOST_SHOWN)}"


def _map(
    function: Callable[[Tensor], Tensor], value: Any, parents: frozenset[int]
) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if id(value) in parents:  # an object that refers to one that holds it
        return value
    parents |= {id(value)}
    parts = _parts(value)
    changes = {}
    for name, part in parts:
        mapped = _map(function, part, parents)
        if mapped is not part:
            changes[name] = mapped
    return _with_changes(value, changes) if changes else value


def _parts(value: Any) -> Iterable[tuple[Any, Any]]:
    """What `value` is made of, each part with its key, index or attribute."""
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, list | tuple):
        return list(enumerate(value))
    if isinstance(value, OPAQUE):
        return []
    if is_dataclass(value):
        parts = []
        for field in fields(value):
            # A field that was never set has no attribute.
            if hasattr(value, field.name):
                parts.append((field.name, getattr(value, field.name)))
        return parts
    if hasattr(value, "__dict__"):
        return list(vars(value).items())
    return []


def _with_changes(value: Any, changes: dict[Any, Any]) -> Any:
    if isinstance(value, Mapping):
        copied: Any = copy.copy(value)
        for name, part in changes.items():
            copied[name] = part
        return copied
    if isinstance(value, list | tuple):
        items = [changes.get(index, item) for index, item in enumerate(value)]
        is_named = isinstance(value, tuple) and hasattr(value, "_fields")
        if is_named:
            return type(value)(*items)
        return type(value)(items)
    copied = copy.copy(value)
    for name, part in changes.items():
        # A frozen dataclass refuses plain assignment, also to its own copy.
        object.__setattr__(copied, name, part)
    return copied
