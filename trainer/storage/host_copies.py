"""Copies of a run's tensors in main memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.storage.threaded_copy import Copy, copy_all

Key = tuple[str, str]  # a tensor's file and its name there


def host_copy(tensor: Tensor) -> Tensor:
    """A copy in row-major order, even of a CPU tensor: tied weights share memory, which safetensors refuses."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def host_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies as `host_copy` makes them, by the same names."""
    return {name: host_copy(tensor) for name, tensor in tensors.items()}


class Copies(NamedTuple):
    """Copies of some tensors, in row-major order. They are complete once `arrive` returns.

    `finite` holds tensors of which the copying has shown that every value is finite; of others nothing is known.
    """

    tensors: dict[Key, Tensor]
    arrive: Callable[[], None]
    finite: list[Tensor]


class HostCopies:
    """Main memory for copies of one set of tensors after the other. A new set overwrites the one before.

    The memory stays, for its pages must be mapped and zeroed the first time, which takes longer than to fill them. On
    CUDA it is pinned: the device copies by itself, while the host goes on.
    """

    def __init__(self) -> None:
        self._memory: dict[Key, Tensor] = {}
        self._can_pin = True

    def missing(self, tensors: Mapping[Key, Tensor]) -> int:
        """The bytes of memory that a copy of `tensors` would need anew."""
        total = 0
        for key, tensor in tensors.items():
            if not self._fits(key, tensor):
                total += tensor.numel() * tensor.element_size()
        return total

    @torch.no_grad()
    def copy(self, tensors: Mapping[Key, Tensor], *, look: bool = False) -> Copies:
        """Copy them. With `look`, those that are on the CPU are looked at, while they pass.

        Whatever the device is given to do after this call does not touch the copies: they are made in its queue's
        order. A stream of their own would let them overlap with the next step only if each writer of a weight (the
        update, an observer, `ema`) waited for them.
        """
        copies = {}
        devices = set()
        on_host: list[Copy] = []
        for key, tensor in tensors.items():
            source = tensor.detach()
            if source.layout != torch.strided:  # which no file can hold
                copies[key] = source.to("cpu", copy=True)
                continue
            is_on_cuda = source.device.type == "cuda"
            copies[key] = self._memory_for(key, source, pinned=is_on_cuda)
            if source.device.type == "cpu":
                on_host.append(Copy(source, copies[key]))
                continue
            copies[key].copy_(source, non_blocking=is_on_cuda)
            if is_on_cuda:
                devices.add(source.device)
        indices = copy_all(on_host, look=look)
        finite = [on_host[index].source for index in indices]
        return Copies(copies, _wait_for(devices), finite)

    def _fits(self, key: Key, tensor: Tensor) -> bool:
        memory = self._memory.get(key)
        return (
            memory is not None
            and memory.shape == tensor.shape
            and memory.dtype == tensor.dtype
        )

    def _memory_for(self, key: Key, tensor: Tensor, *, pinned: bool) -> Tensor:
        if not self._fits(key, tensor):
            self._memory[key] = self._new_memory(tensor, pinned=pinned)
        return self._memory[key]

    def _new_memory(self, tensor: Tensor, *, pinned: bool) -> Tensor:
        if pinned and self._can_pin:
            try:
                return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            except RuntimeError:
                # The system allows no more. Other memory serves too; the host waits while it is filled.
                self._can_pin = False
        return torch.empty(tensor.shape, dtype=tensor.dtype)


def _wait_for(devices: set[torch.device]) -> Callable[[], None]:
    """A function that waits until these devices have done what they were given up to now."""
    events = []
    for device in devices:
        # A thread that waits for it uses no CPU.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        events.append(event)

    def wait() -> None:
        for event in events:
            event.synchronize()

    return wait
