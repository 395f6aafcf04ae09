"""What a recorded graph takes for granted, compared before each step: a replay runs none of the model's Python."""

from __future__ import annotations

from operator import is_
from typing import Any, NamedTuple

from torch import Tensor, nn

from trainer.exact.model_and_loss import ModelAndLoss

HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
)
TABLES = ("_parameters", "_buffers", "_modules")
PLAIN = (bool, int, float, complex, str)


class _Table(NamedTuple):
    """The values of one dictionary of a module, by name."""

    dot: str
    table: dict[str, Any]
    values: tuple[Any, ...]


class Guard:
    """The attributes, hooks, parameters and buffers of a model and its loss, as they are now.

    Tensors are compared by object and memory, not by value, and so are containers: nothing waits for the device.
    """

    def __init__(self, whole: ModelAndLoss) -> None:
        self._tables: list[_Table] = []
        self._hooks: list[tuple[str, dict[Any, Any]]] = []
        for name, module in whole.named_modules():
            dot = f"{name}." if name else ""
            for table in [vars(module), *(vars(module)[key] for key in TABLES)]:
                self._tables.append(_Table(dot, table, tuple(table.values())))
            self._hooks += [(name, vars(module)[key]) for key in HOOKS]
        tensors = [*whole.named_parameters(), *whole.named_buffers()]
        self._tensors = tensors
        self._memory = [_memory_of(tensor) for _, tensor in tensors]

    def change(self) -> str:
        """What is no longer as it was, by its name; "" if all is."""
        for dot, table, values in self._tables:
            is_same = len(table) == len(values) and all(map(is_, table.values(), values))
            if not is_same and (name := _changed_name(table, values)):
                return f"{dot}{name}"
        for (name, tensor), memory in zip(self._tensors, self._memory, strict=True):
            if _memory_of(tensor) != memory:
                return name
        return self.hooks()

    def hooks(self) -> str:
        """A module or a parameter that has hooks, in words; "" if none has."""
        for name, table in self._hooks:
            if table:
                return f"a hook of {name or 'the model'}"
        for name, tensor in self._tensors:
            if tensor._backward_hooks or _has_hook_after(tensor):
                return f"a hook of {name}"
        return ""


def _memory_of(tensor: Tensor) -> tuple[int, bool]:
    return tensor.data_ptr(), tensor.requires_grad


def _has_hook_after(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and bool(
        tensor._post_accumulate_grad_hooks  # type: ignore[attr-defined]
    )


def _changed_name(table: dict[str, Any], values: tuple[Any, ...]) -> str:
    """The first entry with another value; "" where values are other objects and equal."""
    if len(table) != len(values):
        return "an attribute that came or went"
    for (name, value), before in zip(table.items(), values, strict=True):
        if value is before:
            continue
        is_plain = type(value) is type(before) and isinstance(value, PLAIN)
        if not is_plain or value != before:
            return name
    return ""
