"""A module's tensors as a run needs them: its device, its dtype, and memory of their own."""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainer.errors import listed
from trainer.exact.structures import dtype_name


def cast(
    module: nn.Module, dtype: torch.dtype, device: torch.device | None = None
) -> None:
    """What `module.to(device, dtype)` does, and the same whether or not that copies anything.

    - A buffer that modules share stays one: `to` copies it for each module, where it copies.
    - Complex parameters and buffers stay complex: `to` makes real numbers of them, with a warning, and the module
      computes something else.
    - An expanded tensor, whose rows are one in memory, gets rows of its own: it could not be updated or loaded.
    """
    owners = _owners_of_shared_buffers(module)
    tensors = list(chain(module.parameters(), module.buffers()))
    if any(tensor.is_complex() for tensor in tensors):
        _convert(module, dtype, device)
    else:
        module.to(device=device, dtype=dtype)
    for first, *others in owners:
        shared = first.module._buffers[first.key]
        for other in others:
            other.module._buffers[other.key] = shared
    for tensor in chain(module.parameters(), module.buffers()):
        if _is_expanded(tensor):
            # Through `data`: it stays the same parameter, in the modules that share it.
            tensor.data = tensor.data.contiguous()


def describe_converted(module: nn.Module, dtype: torch.dtype) -> str:
    """A line on parameters and buffers that have a dtype of their own, before `cast`; "" if none has.

    Not on float32, which torch gives them if nobody asks for another.
    """
    names: dict[str, list[str]] = {}
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        is_own = tensor.dtype not in (dtype, torch.float32)
        if is_own and tensor.is_floating_point():
            names.setdefault(dtype_name(tensor.dtype), []).append(f'"{name}"')
    if not names:
        return ""
    converted = [f"{listed(of, 3)} of {kind}" for kind, of in names.items()]
    return (
        f"train.precision makes {dtype_name(dtype)} of all floating parameters and buffers, also of "
        f"{' and '.join(converted)}"
    )


class _Owner(NamedTuple):
    """A module, and the key of one of its buffers."""

    module: nn.Module
    key: str


def _owners_of_shared_buffers(module: nn.Module) -> list[list[_Owner]]:
    """For each buffer that is in several places, those places."""
    owners: dict[int, list[_Owner]] = {}
    for part in module.modules():
        for key, buffer in part._buffers.items():
            if buffer is not None:
                owners.setdefault(id(buffer), []).append(_Owner(part, key))
    return [places for places in owners.values() if len(places) > 1]


def _convert(
    module: nn.Module, dtype: torch.dtype, device: torch.device | None
) -> None:
    def convert(tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            return tensor.to(device=device, dtype=dtype.to_complex())
        if tensor.is_floating_point():
            return tensor.to(device=device, dtype=dtype)
        return tensor.to(device=device)

    module._apply(convert)  # type: ignore[no-untyped-call]


def _is_expanded(tensor: Tensor) -> bool:
    if tensor.layout != torch.strided:
        return False
    return any(
        size > 1 and stride == 0
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
