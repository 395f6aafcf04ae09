"""What a forward can change, kept and put back: tensors, plain attributes and generators of a model and its loss."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from trainer.core.build import Run
from trainer.core.proof.generators import preserved, preserved_in
from trainer.exact.seeding import device_generator, preserved_cpu_generators

# Attributes of `nn.Module` itself, whose parts are looked at one by one.
OF_TORCH = frozenset(vars(nn.Module()))
LARGEST_CONTAINER = 10_000  # items; larger ones are data rather than state
NOTHING = "nothing"  # the content of None
DEPTH = 4  # of containers and objects within each other


class _Slot(NamedTuple):
    """An attribute of a module, the object that it held, and a copy of what was in that object."""

    name: str
    owner: dict[str, Any]
    key: str
    value: Any
    content: Any


class ModuleState:
    """The state of a module and its parts: buffers, plain attributes and, on request, parameters.

    A copy of the tensors is held on their device.
    """

    def __init__(self, module: nn.Module, *, weights: bool = True) -> None:
        self._slots: list[_Slot] = []
        # Of each part: the prefix of its names, a table of what it has, and the names that were in it.
        self._tables: list[tuple[str, dict[str, Any], frozenset[str]]] = []
        for prefix, part in module.named_modules():
            dot = f"{prefix}." if prefix else ""
            tables = [part._buffers, part._parameters] if weights else [part._buffers]
            for table in tables:
                self._keep(dot, table, list(table))
            attributes = vars(part)
            self._keep(dot, attributes, [n for n in attributes if n not in OF_TORCH])

    def _keep(self, dot: str, table: dict[str, Any], names: list[str]) -> None:
        self._tables.append((dot, table, frozenset(names)))
        for name in names:
            value = table[name]
            self._slots.append(_Slot(dot + name, table, name, value, _content(value)))

    def restore(self) -> None:
        """Put everything back."""
        for _, table, names in self._tables:
            for name in _added(table, names):
                del table[name]
        for slot in self._slots:
            slot.owner[slot.key] = slot.value
            _put_back(slot.value, slot.content)

    def changes(self) -> list[str]:
        """The names of what has changed."""
        names = []
        for slot in self._slots:
            value = slot.owner.get(slot.key)
            if not _is_equal(value, slot.content):
                names.append(slot.name)
        for dot, table, known in self._tables:
            names += [dot + name for name in _added(table, known)]
        return names


def _added(table: dict[str, Any], names: frozenset[str]) -> list[str]:
    return [name for name in table if name not in names and name not in OF_TORCH]


@contextmanager
def without_trace(run: Run, *, weights: bool = False) -> Iterator[None]:
    """Put the state of the model and its loss, their gradients and all generators back at the end, also after an error.

    `weights` says whether their parameters are copied, too: a forward may change them.
    """
    modules = (run.module, run.task)
    states = [ModuleState(module, weights=weights) for module in modules]
    gradients = []
    for module in modules:
        gradients += [(parameter, parameter.grad) for parameter in module.parameters()]
        module.zero_grad()
    try:
        with ExitStack() as stack:
            stack.enter_context(preserved_cpu_generators())
            if run.ranks.device.type == "cuda":
                stack.enter_context(preserved([device_generator(run.ranks.device)]))
            for module in modules:
                stack.enter_context(preserved_in(module))
            yield
    finally:
        for state in states:
            state.restore()
        for parameter, gradient in gradients:
            parameter.grad = gradient


# ---------------------------------------------------------------- the contents of objects


def _content(value: Any, depth: int = DEPTH) -> Any:
    """A copy of what is in `value`; None where that cannot change or is not looked at."""
    match value:
        case None:
            return NOTHING
        case Tensor():
            # A part of a graph is computed anew by every forward.
            is_state = value.is_leaf or not value.requires_grad
            return value.detach().clone() if is_state else None
        case np.ndarray():
            return value.copy()
        case list() | deque() | set() | tuple() if (
            depth and len(value) <= LARGEST_CONTAINER
        ):
            return [(item, _content(item, depth - 1)) for item in value]
        case dict() if depth and len(value) <= LARGEST_CONTAINER:
            return {
                key: (item, _content(item, depth - 1)) for key, item in value.items()
            }
        case bool() | int() | float() | complex() | str():
            return value
        case _ if depth and _is_plain_object(value):
            return _content(vars(value), depth - 1)
    return None


def _is_plain_object(value: Any) -> bool:
    """True for an object of somebody's own class, which may keep state in its attributes."""
    package = type(value).__module__.partition(".")[0]
    is_foreign = package in (
        "builtins",
        "torch",
        "numpy",
        "types",
        "functools",
        "random",
    )
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, type | nn.Module)
        and not is_foreign
    )


@torch.no_grad()
def _put_back(value: Any, content: Any) -> None:
    if content is None:
        return
    match value:
        case Tensor():
            if value.shape == content.shape:
                value.data.copy_(content)  # as if it had not been written
        case np.ndarray():
            if value.flags.writeable:
                value[...] = content
        case list() | deque() | set():
            for item, inner in content:
                _put_back(item, inner)
            items = [item for item, _ in content]
            value.clear()
            value.update(items) if isinstance(value, set) else value.extend(items)
        case tuple():
            for item, inner in content:
                _put_back(item, inner)
        case dict():
            value.clear()
            for key, (item, inner) in content.items():
                _put_back(item, inner)
                value[key] = item
        case _ if isinstance(content, dict):
            _put_back(vars(value), content)


def _is_equal(value: Any, content: Any) -> bool:
    """True if what is in `value` is still `content`, or was not looked at."""
    if content is None:
        return True
    match value:
        case None:
            return bool(content == NOTHING)
        case Tensor():
            return isinstance(content, Tensor) and same_bits(value, content)
        case np.ndarray():
            if not isinstance(content, np.ndarray):
                return False
            is_same: bool = value.tobytes() == content.tobytes()
            return is_same
        case list() | deque() | set() | tuple():
            if not isinstance(content, list) or len(value) != len(content):
                return False
            return all(map(_is_same_item, value, content))
        case dict():
            if not isinstance(content, dict) or value.keys() != content.keys():
                return False
            return all(_is_same_item(value[key], content[key]) for key in value)
        case bool() | int() | float() | complex() | str():
            return repr(value) == repr(content)  # a NaN equals itself
    return isinstance(content, dict) and _is_equal(vars(value), content)


def _is_same_item(value: Any, kept: tuple[Any, Any]) -> bool:
    item, content = kept
    return value is item if content is None else _is_equal(value, content)


def same_bits(first: Tensor, second: Tensor) -> bool:
    """True if two tensors have the same shape, dtype and bits."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.equal(_bytes(first), _bytes(second))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
