"""What a forward can change, kept and put back: tensors, plain attributes and generators of a model and its loss."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from operator import is_
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from trainer.core.proof.generators import preserved, preserved_in
from trainer.core.run import Run
from trainer.exact.seeding import device_generator, preserved_cpu_generators

# Attributes of `nn.Module` itself, whose parts are looked at one by one.
OF_TORCH = frozenset(vars(nn.Module()))
LARGEST_CONTAINER = 10_000  # items; larger ones are data rather than state
LARGEST_TENSOR = 1 << 28  # bytes of one in a plain attribute; a larger one is data, too
NOTHING = "nothing"  # the content of None
# Packages whose objects are no state of a model: functions, devices, generators, which have their own copies.
FOREIGN = ("builtins", "torch", "numpy", "types", "functools", "random")
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
            tables: list[dict[str, Any]] = [part._buffers]
            if weights:
                tables.append(part._parameters)
            for table in tables:
                self._keep(dot, table, list(table), _content_of_tensor)
            attributes = vars(part)
            names = [name for name in attributes if name not in OF_TORCH]
            # An object that several refer to is looked at once.
            copier = _Copier()
            self._keep(dot, attributes, names, copier.content)

    def _keep(
        self,
        dot: str,
        table: dict[str, Any],
        names: list[str],
        content: Callable[[Any], Any],
    ) -> None:
        self._tables.append((dot, table, frozenset(names)))
        for name in names:
            value = table[name]
            slot = _Slot(dot + name, table, name, value, content(value))
            self._slots.append(slot)

    def restore(self, *, attributes: bool = True) -> None:
        """Put everything back; without `attributes`, the module's own tensors alone."""
        for _, table, names in self._tables:
            for name in _added(table, names):
                if attributes or "_parameters" not in table:
                    del table[name]
        for slot in self._slots:
            if not attributes and "_parameters" in slot.owner:
                continue  # in a module's own dictionary, not in that of its tensors
            slot.owner[slot.key] = slot.value
            _put_back(slot.value, slot.content)

    def differences(self, parts: Mapping[str, nn.Module]) -> list[str]:
        """The names of plain attributes that are others in `parts`, the modules of another model by their paths."""
        names = []
        for slot in self._slots:
            path, _, key = slot.name.rpartition(".")
            if "_parameters" in slot.owner and path in parts:
                value = vars(parts[path]).get(key)
                if not _is_equal(value, slot.content):
                    names.append(slot.name)
        return names

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
def without_trace(run: Run, *, weights: bool = False) -> Iterator[list[ModuleState]]:
    """Put the state of the model and its loss, their gradients and all generators back at the end, also after an error.

    `weights` says whether their parameters are copied, too: a forward may change them. Yields the states of both, which
    may be restored in between.
    """
    modules = (run.module, run.task)
    states = [ModuleState(module, weights=weights) for module in modules]
    gradients = []
    for module in modules:
        for parameter in module.parameters():
            gradients.append((parameter, parameter.grad))
        module.zero_grad()
    try:
        with ExitStack() as stack:
            stack.enter_context(preserved_cpu_generators())
            device = run.ranks.device
            if device.type == "cuda":
                stack.enter_context(preserved([device_generator(device)]))
            for module in modules:
                stack.enter_context(preserved_in(module))
            yield states
    finally:
        for state in states:
            state.restore()
        for parameter, gradient in gradients:
            parameter.grad = gradient


# ---------------------------------------------------------------- the contents of objects


def _content_of_tensor(value: Tensor | None, largest: float = math.inf) -> Any:
    if value is None:
        return NOTHING
    is_plain = value.layout == torch.strided and not is_lazy(value)
    # A part of a graph is computed anew by every forward.
    is_state = value.is_leaf or not value.requires_grad
    if not is_plain or not is_state or value.nbytes > largest:
        return None
    return value.detach().clone()


class _Copier:
    """Copies what is in the plain attributes of a module."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def content(self, value: Any, depth: int = DEPTH) -> Any:
        """A copy of what is in `value`; None where that cannot change or is not looked at."""
        match value:
            case None:
                return NOTHING
            case bool() | int() | float() | complex() | str():
                return value
            case Tensor():
                return _content_of_tensor(value, LARGEST_TENSOR)
            case np.ndarray():
                is_small = value.nbytes <= LARGEST_TENSOR
                return value.copy() if is_small else None
        # Objects may refer to each other in a circle, and to a whole program.
        if not depth or id(value) in self._seen:
            return None
        self._seen.add(id(value))
        return self._content_of_container(value, depth - 1)

    def _content_of_container(self, value: Any, depth: int) -> Any:
        match value:
            case list() | deque() | set() | tuple():
                if len(value) > LARGEST_CONTAINER:
                    return None
                return [(item, self.content(item, depth)) for item in value]
            case dict():
                return self._content_of_items(value, depth)
        if _is_plain_object(value):
            return self._content_of_items(vars(value), depth)
        return None

    def _content_of_items(self, items: dict[Any, Any], depth: int) -> Any:
        if len(items) > LARGEST_CONTAINER:
            return None
        contents = {}
        for key, item in items.items():
            contents[key] = (item, self.content(item, depth))
        return contents


def _is_plain_object(value: Any) -> bool:
    """True for an object of somebody's own class, which may keep state in its attributes."""
    if not hasattr(value, "__dict__") or isinstance(value, type | nn.Module):
        return False
    package, _, _ = type(value).__module__.partition(".")
    return package not in FOREIGN


@torch.no_grad()
def _put_back(value: Any, content: Any) -> None:
    if content is None:
        return
    match value:
        case Tensor():
            if value.shape == content.shape and not _repeats_memory(value):
                # Through `data`, autograd does not count it as a change: graphs that hold the tensor stay valid.
                value.data.copy_(content)
        case np.ndarray():
            if value.flags.writeable:
                value[...] = content
        case list() | deque() | set() | tuple():
            items = []
            for item, inner in content:
                _put_back(item, inner)
                items.append(item)
            _put_back_items(value, items)
        case dict():
            _put_back_values(value, content)
        case _ if isinstance(content, dict):
            _put_back_values(vars(value), content)


def _put_back_items(value: Any, items: list[Any]) -> None:
    is_same = len(value) == len(items) and all(map(is_, value, items))
    if is_same or isinstance(value, tuple):
        return
    value.clear()
    if isinstance(value, set):
        value.update(items)
    else:
        value.extend(items)


def _put_back_values(table: dict[Any, Any], content: dict[Any, Any]) -> None:
    if list(table) != list(content):
        table.clear()  # so that the order comes back, too
    for key, (item, inner) in content.items():
        _put_back(item, inner)
        if key not in table or table[key] is not item:
            table[key] = item


def _repeats_memory(tensor: Tensor) -> bool:
    """True if several elements are one in memory, as after `expand`: such a tensor cannot be written."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return any(size > 1 and stride == 0 for size, stride in pairs)


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
    if content is None:
        return value is item
    return _is_equal(value, content)


def same_bits(first: Tensor, second: Tensor) -> bool:
    """True if two tensors have the same shape, dtype and bits."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.equal(_bytes(first), _bytes(second))


def _bytes(tensor: Tensor) -> Tensor:
    # As bytes, a NaN equals itself, and -0.0 is not 0.0.
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8)
