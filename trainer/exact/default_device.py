"""Tensors on the CPU unless somebody asks for another device, whatever the caller's program has set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _device
from torch.utils._device import DeviceContext

# With functions of torch's own, which have no types.
_stack: Any = torch.overrides


@contextmanager
def without_default_device() -> Iterator[None]:
    """As if the caller used neither `torch.set_default_device` nor `with torch.device(…)`. Both come back at the end.

    `torch.device("cpu")` within them would give the same tensors, and make every call of torch slower: it is a mode
    that looks at each of them.
    """
    default = torch._GLOBAL_DEVICE_CONTEXT
    set_before = getattr(default, "device_context", None)
    current_before = _device.CURRENT_DEVICE
    modes_before = _take_device_modes()
    # Or the next `set_default_device` would end the mode that is taken away already.
    default.device_context = None
    _device.CURRENT_DEVICE = None
    try:
        yield
    finally:
        _take_device_modes()  # what somebody has set in between
        _put_at_bottom(modes_before)
        default.device_context = set_before
        _device.CURRENT_DEVICE = current_before


def _take_device_modes() -> list[DeviceContext]:
    """Take the modes that set a device off torch's stack of modes; the others stay, in their order."""
    taken = []
    others = []
    for mode in _pop_all():
        if isinstance(mode, DeviceContext):
            taken.append(mode)
        else:
            others.append(mode)
    _push_all(others)
    return taken


def _put_at_bottom(modes: list[DeviceContext]) -> None:
    """Where torch expects them: below all other modes."""
    others = _pop_all()
    _push_all([*others, *modes])


def _pop_all() -> list[TorchFunctionMode]:
    """The modes on torch's stack, the topmost first. None is left there."""
    modes: list[TorchFunctionMode] = []
    for _ in range(_stack._len_torch_function_stack()):
        modes.append(_stack._pop_mode())
    return modes


def _push_all(modes: Sequence[TorchFunctionMode]) -> None:
    """Put modes on the stack; the first one becomes the topmost."""
    for mode in reversed(modes):
        _stack._push_mode(mode)
