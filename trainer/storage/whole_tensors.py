"""Whole tensors on the main process's host, of tensors of which each rank holds a part; and back.

One of them is whole on a device at a time.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trainer.exact.shards import is_shard, part_like, whole
from trainer.process.ranks import Ranks


def collect(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Copies of the whole tensors, contiguous on the CPU, on the main process; none on the others. A collective."""
    collected = {}
    for name, tensor in tensors.items():
        on_device = whole(tensor)
        if ranks.is_main:
            # A copy even of CPU tensors: tied weights share memory, which safetensors refuses.
            copy = on_device.detach().to("cpu", copy=True)
            collected[name] = copy.contiguous()
    return collected


@torch.no_grad()
def spread(module: nn.Module, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Give every rank its part of rank 0's `tensors`, those of the module's `state_dict`. A collective."""
    own = module.state_dict()
    for name, received in ranks.broadcast_each(tensors):
        tensor = own[name]
        tensor.copy_(part_like(tensor, received) if is_shard(tensor) else received)
