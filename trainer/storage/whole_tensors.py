"""Whole tensors on the main process's host, of tensors of which each rank holds a part; and back.

One of them is whole on a device at a time.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trainer.exact.shards import has_shards, is_shard, part_like, whole
from trainer.process.ranks import Ranks
from trainer.storage.host_copies import host_copy


def collect(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Copies of the whole tensors, contiguous on the CPU, on the main process; none on the others. A collective."""
    collected = {}
    for name, tensor in tensors.items():
        on_device = whole(tensor)
        if ranks.is_main:
            collected[name] = host_copy(on_device)
    return collected


def share(
    tensors: Mapping[str, Tensor], module: nn.Module, ranks: Ranks
) -> dict[str, Tensor]:
    """Rank 0's `tensors`, an optimizer's state by `<key>.<parameter>`, on every rank. A collective.

    Where a parameter of `module` is shared out, what has its shape is cut as it is, and else all is on the CPU.
    """
    if not has_shards(module):
        return ranks.broadcast_tensors(tensors)
    parameters = dict(module.named_parameters())
    results = {}
    for name, received in ranks.broadcast_each(tensors):
        _, _, owner = name.partition(".")
        parameter = parameters.get(owner)
        if parameter is not None and parameter.shape == received.shape:
            # A copy: the part alone would keep the memory of the whole.
            results[name] = part_like(parameter, received).clone()
        else:
            results[name] = received.cpu()
    return results


@torch.no_grad()
def spread(module: nn.Module, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Give every rank its part of rank 0's `tensors`, those of the module's `state_dict`. A collective."""
    own = module.state_dict()
    for name, received in ranks.broadcast_each(tensors):
        tensor = own[name]
        tensor.copy_(part_like(tensor, received) if is_shard(tensor) else received)
