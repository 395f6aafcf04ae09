"""What an optimizer consists of: itself, optimizers that it holds, and attributes that are state of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim import Optimizer

from trainer.components.state_tree import Encoder, UnsupportedValueError

_inner: WeakKeyDictionary[Optimizer, dict[str, Optimizer]] = WeakKeyDictionary()
# Attributes as the constructor left them, as trees: they come from the config, not from training.
_as_built: WeakKeyDictionary[Optimizer, dict[str, Any]] = WeakKeyDictionary()
# Attributes of every optimizer: those of torch's base class, which `named_state` knows.
BASE_ATTRIBUTES = {
    *vars(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)),
    *("state", "param_groups", "defaults"),
}


def inner_optimizers(optimizer: Optimizer) -> dict[str, Optimizer]:
    """The optimizers that a wrapper holds, and those that they hold, by the path of attributes.

    Found once: it is asked for in every step.
    """
    found = _inner.get(optimizer)
    if found is None:
        found = _inner[optimizer] = {}
        _collect(optimizer, "", found, {id(optimizer)})
    return found


def with_inner(optimizer: Optimizer) -> tuple[Optimizer, ...]:
    """The optimizer, and those that it holds."""
    return (optimizer, *inner_optimizers(optimizer).values())


def _collect(
    optimizer: Optimizer, prefix: str, found: dict[str, Optimizer], seen: set[int]
) -> None:
    for name, value in _optimizers_in(vars(optimizer)):
        if id(value) not in seen:
            seen.add(id(value))
            found[prefix + name] = value
            _collect(value, f"{prefix}{name}.", found, seen)


def _optimizers_in(attributes: Mapping[str, Any]) -> Iterator[tuple[str, Optimizer]]:
    for name, value in attributes.items():
        if isinstance(value, Optimizer):
            yield name, value
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                if isinstance(item, Optimizer):
                    yield f"{name}[{index}]", item
        elif isinstance(value, dict) and name not in BASE_ATTRIBUTES:
            for key, item in value.items():
                if isinstance(item, Optimizer):
                    yield f"{name}[{key}]", item


def own_attributes(optimizer: Optimizer) -> dict[str, Any]:
    """The attributes that not every optimizer has, and that hold no optimizer. torch's own have no state there."""
    if type(optimizer).__module__.startswith("torch.optim."):
        return {}
    with_optimizers = {
        name.partition("[")[0] for name, _ in _optimizers_in(vars(optimizer))
    }
    attributes = {}
    for name, value in vars(optimizer).items():
        if name not in BASE_ATTRIBUTES and name not in with_optimizers:
            attributes[name] = value
    return attributes


def remember_as_built(optimizer: Optimizer) -> None:
    """Note the plain attributes of a new optimizer, and of those in it; only those that change are state."""
    for part in with_inner(optimizer):
        trees = {}
        for name, value in own_attributes(part).items():
            encoder = Encoder({})
            with suppress(UnsupportedValueError):
                tree = encoder.encode(value, name)
                if not encoder.tensors:
                    trees[name] = tree
        _as_built[part] = trees


def is_as_built(optimizer: Optimizer, name: str, tree: Any) -> bool:
    """True if an attribute is what it was in a new optimizer."""
    trees = _as_built.get(optimizer, {})
    return name in trees and bool(trees[name] == tree)


def set_attribute(optimizer: Optimizer, name: str, value: Any) -> None:
    """Give an attribute a value; a dict or list that is there is filled anew, because other parts may hold it too."""
    present = getattr(optimizer, name, None)
    if isinstance(present, dict) and isinstance(value, dict):
        present.clear()
        present.update(value)
    elif isinstance(present, list) and isinstance(value, list):
        present[:] = value
    else:
        object.__setattr__(optimizer, name, value)
