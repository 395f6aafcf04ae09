"""Tensors of which each rank holds a part: torch's `DTensor`, as `fully_shard` leaves parameters and their gradients.

A parameter is cut along its first dimension, as `torch.chunk` cuts: a rank's part is contiguous in the whole, and may
be empty. All functions take plain tensors, too, which are their own whole.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn


def is_shard(tensor: object) -> bool:
    """True for a tensor of which this rank holds a part."""
    # Importing the module takes a second, and without it there is none.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def has_shards(module: nn.Module) -> bool:
    """True if the parameters of `module` are shared out over the ranks."""
    return any(map(is_shard, module.parameters()))


def blocks_in(module: nn.Module) -> list[str]:
    """The names of the blocks that are gathered one by one; the rest of the model is gathered with the model."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return []
    parts = module.named_modules()
    return [name for name, part in parts if name and isinstance(part, fsdp.FSDPModule)]


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module's author wrote: `fully_shard` puts a subclass in its place."""
    kind = type(module)
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not isinstance(module, fsdp.FSDPModule):
        return kind
    original: type[nn.Module] = kind.__mro__[2]
    return original


@torch.no_grad()
def local_part(tensor: Tensor) -> Tensor:
    """This rank's part, which shares memory with `tensor`."""
    if not is_shard(tensor):
        return tensor
    as_shard: Any = tensor
    part: Tensor = as_shard.to_local()
    return part


def first_element(tensor: Tensor) -> int:
    """The index of the first element of this rank's part among all elements of the whole, in row-major order."""
    if not is_shard(tensor) or not tensor.numel():
        return 0
    as_shard: Any = tensor
    rows = tensor.shape[0]
    mesh = as_shard.device_mesh
    rows_of_a_rank = -(-rows // mesh.size())
    first_row: int = min(mesh.get_local_rank() * rows_of_a_rank, rows)
    return first_row * (tensor.numel() // rows)


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, on the device. A collective for a shard; a plain tensor is returned as it is."""
    if not is_shard(tensor):
        return tensor
    as_shard: Any = tensor
    result: Tensor = as_shard.full_tensor()
    return result


@torch.no_grad()
def part_like(shard: Tensor, value: Tensor) -> Tensor:
    """This rank's part of the plain tensor `value`, with the dtype of `value`, cut as `shard` is. No collective."""
    from torch.distributed.tensor import distribute_tensor

    as_shard: Any = shard
    on_device = value.to(as_shard.device_mesh.device_type)
    # Without a source every rank cuts what it has.
    return distribute_tensor(
        on_device, as_shard.device_mesh, as_shard.placements, src_data_rank=None
    )
