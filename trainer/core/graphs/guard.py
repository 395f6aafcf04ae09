"""What a recorded graph takes for granted, compared before each step: a replay runs none of the model's Python."""

from __future__ import annotations

from collections.abc import Callable
from operator import is_, itemgetter
from typing import Any, NamedTuple

from torch import Tensor, nn

from trainer.core.proof.state import OF_TORCH
from trainer.exact.model_and_loss import ModelAndLoss

HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
)
TABLES = ("_parameters", "_buffers", "_modules")
PLAIN = (bool, int, float, complex, str)


class _Entries(NamedTuple):
    """The entries `names` of a dictionary of a module, and its length."""

    dot: str
    table: dict[str, Any]
    length: int
    names: tuple[str, ...]
    get: Callable[[dict[str, Any]], tuple[Any, ...]]  # all of them at once
    values: tuple[Any, ...]


class Guard:
    """The attributes, hooks, parameters and buffers of a model and its loss, as they are now.

    Tensors are compared by object and memory, not by value, and containers by object: nothing waits for the device.
    """

    def __init__(self, whole: ModelAndLoss) -> None:
        self._entries: list[_Entries] = []
        self._empty: list[tuple[str, dict[str, Any]]] = []
        for name, module in whole.named_modules():
            self._watch_module(name, module)
        # Asked for in each step: none of them has an entry as long as nothing has changed.
        self._empty_tables = [table for _, table in self._empty]
        named = [*whole.named_parameters(), *whole.named_buffers()]
        self._names = [name for name, _ in named]
        self._tensors = [tensor for _, tensor in named]
        self._parameters = [p for p in self._tensors if isinstance(p, nn.Parameter)]
        self._memory = _memory_of(self._tensors)
        self._are_trained = [tensor.requires_grad for tensor in self._tensors]

    def _watch_module(self, name: str, module: nn.Module) -> None:
        dot = f"{name}." if name else ""
        attributes = vars(module)
        own = []
        for key in attributes:
            if key not in OF_TORCH or key == "training":
                own.append(key)
        self._entries.append(_entries_of(dot, attributes, own))
        for key in TABLES:
            table = attributes[key]
            if table:
                self._entries.append(_entries_of(dot, table, list(table)))
            else:
                self._empty.append((f"{dot}{key}", table))
        for key in HOOKS:
            hooks = attributes[key]
            self._empty.append((f"a hook of {name or 'the model'}", hooks))

    def change(self) -> str:
        """What is no longer as it was, by its name; "" if all is."""
        try:
            return self._change()
        except KeyError as error:
            return str(error.args[0])

    def _change(self) -> str:
        for entries in self._entries:
            if len(entries.table) != entries.length:
                module = entries.dot.rstrip(".")
                return f"an attribute of {module or 'the model'}"
            values = entries.get(entries.table)
            if not all(map(is_, values, entries.values)):
                name = _changed_name(entries, values)
                if name:
                    return name
        memory = _memory_of(self._tensors)
        if memory != self._memory:
            return self._first_other(memory, self._memory)
        are_trained = [tensor.requires_grad for tensor in self._tensors]
        if are_trained != self._are_trained:
            return self._first_other(are_trained, self._are_trained)
        return self.hooks()

    def hooks(self) -> str:
        """A module or a parameter that has hooks, in words; "" if none has."""
        if any(self._empty_tables):
            return next(name for name, table in self._empty if table)
        for name, tensor in zip(self._names, self._tensors, strict=True):
            if tensor._backward_hooks:
                return f"a hook of {name}"
        for name, parameter in zip(self._names, self._parameters, strict=False):
            if parameter._post_accumulate_grad_hooks:
                return f"a hook of {name}"
        return ""

    def _first_other(self, now: list[Any], before: list[Any]) -> str:
        pairs = zip(self._names, now, before, strict=True)
        return next(name for name, value, other in pairs if value != other)


def _entries_of(dot: str, table: dict[str, Any], names: list[str]) -> _Entries:
    # Of a single name, `itemgetter` would give no tuple.
    chosen = tuple(names) if len(names) > 1 else (names[0], names[0])
    get = itemgetter(*chosen)
    return _Entries(dot, table, len(table), chosen, get, get(table))


def _memory_of(tensors: list[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _changed_name(entries: _Entries, values: tuple[Any, ...]) -> str:
    """The first entry with another value; "" where values are other objects and equal."""
    for name, value, before in zip(entries.names, values, entries.values, strict=True):
        if value is before:
            continue
        is_plain = type(value) is type(before) and isinstance(value, PLAIN)
        if not is_plain or value != before:
            return f"{entries.dot}{name}"
    return ""
