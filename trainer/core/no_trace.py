"""A trial before training must leave nothing behind: neither in tensors nor in what a module counts by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def attributes_restored(modules: Sequence[nn.Module]) -> Iterator[None]:
    """A context after which each module has the attributes and buffers that it had, with their values.

    What is changed in place, other than a tensor, stays changed: a list that a forward appends to.
    """
    states = [_ModuleState(module) for module in modules]
    try:
        yield
    finally:
        for state in states:
            state.restore()


class _ModuleState:
    """What one module holds, without its submodules."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._attributes = dict(vars(module))
        self._buffers = dict(module._buffers)
        tensors = [*self._attributes.values(), *self._buffers.values()]
        self._tensors = [
            (tensor, tensor.detach().clone())
            for tensor in tensors
            if isinstance(tensor, Tensor)
        ]

    @torch.no_grad()
    def restore(self) -> None:
        attributes: dict[str, Any] = vars(self._module)
        attributes.clear()
        attributes.update(self._attributes)
        self._module._buffers.clear()
        self._module._buffers.update(self._buffers)
        for tensor, before in self._tensors:
            tensor.copy_(before)
