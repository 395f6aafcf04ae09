"""A digest of a model's weights that is cheap enough for every log interval.

Each element's bits and its position are mixed into 64 bits, and these are added up as integers. Integer addition wraps
and never rounds, so the sum is the same in any order. The sum stays on the device, 8 bytes, until it is read. It tells
runs apart but is no cryptographic hash (`summary.json` has those).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from trainer.exact.shards import first_element, is_shard, local_part
from trainer.process.ranks import Ranks

# Elements mixed at a time, which bounds the temporary memory. On a CPU it is to stay in the cache.
CHUNK, CPU_CHUNK = 1 << 22, 1 << 16
# By the bytes of an element.
INTEGER_TYPES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# 0x9E3779B97F4A7C15 and 0xBF58476D1CE4E5B9, SplitMix64's constants, as signed numbers: torch has no uint64 arithmetic.
GOLDEN = -7046029254386353131
MIXER = -4658895280553007687


@torch.no_grad()
def digest(tensors: Mapping[str, Tensor]) -> Tensor:
    """A 0-dim int64 tensor, on the device of the tensors, of all bits of `tensors` in the order of their names.

    The mixing is one round of SplitMix64's (Steele, Lea and Flood, 2014, "Fast splittable pseudorandom number
    generators"). Does not wait for the device.
    """
    total = None
    position = 1  # not 0, of which every multiple is 0
    for bits in _chunks(tensors):
        part = _mixed(bits, position).sum()
        total = part if total is None else total.to(part.device) + part
        position += len(bits)
    return torch.zeros((), dtype=torch.int64) if total is None else total


@torch.no_grad()
def digest_of_shards(tensors: Mapping[str, Tensor], ranks: Ranks) -> Tensor:
    """What `digest` gives for the whole of tensors of which each rank holds a part. A collective.

    Each rank adds up its own elements, by their positions in the whole.
    """
    total = torch.zeros((), dtype=torch.int64, device=ranks.device)
    position = 1
    for name in sorted(tensors):
        tensor = tensors[name]
        # What every rank holds whole counts once.
        if is_shard(tensor) or ranks.is_main:
            start = position + first_element(tensor)
            bits = _bits(local_part(tensor))
            for piece in torch.split(bits, _chunk_on(bits.device)):
                total += _mixed(piece.long(), start).sum()
                start += len(piece)
        position += tensor.numel()
    return ranks.sum_(total)


def _mixed(bits: Tensor, position: int) -> Tensor:
    """Each element's bits, int64, mixed with its position, the first one's being `position`."""
    mixed = torch.arange(position, position + len(bits), device=bits.device)
    mixed.mul_(GOLDEN).bitwise_xor_(bits).mul_(MIXER)
    return mixed.bitwise_xor_(mixed >> 32)


def hexadecimal(value: Tensor) -> str:
    """A digest as logs show it: 16 hexadecimal digits. Waits for the device."""
    unsigned = int(value.item()) % (1 << 64)
    return f"{unsigned:016x}"


def _chunks(tensors: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """The bits of all elements as int64, in pieces: small tensors are joined and large ones cut."""
    group: list[Tensor] = []
    length = 0
    for name in sorted(tensors):
        bits = _bits(tensors[name])
        chunk = _chunk_on(bits.device)
        if group and length + len(bits) > chunk:
            yield torch.cat(group).long()
            group = []
            length = 0
        if len(bits) > chunk:
            for piece in torch.split(bits, chunk):
                yield piece.long()
        else:
            group.append(bits)
            length += len(bits)
    if group:
        yield torch.cat(group).long()


def _chunk_on(device: torch.device) -> int:
    return CPU_CHUNK if device.type == "cpu" else CHUNK


def _bits(tensor: Tensor) -> Tensor:
    """The bits of a tensor's elements, `(n,)`, as integers of the same size."""
    flat = tensor.reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    return flat.view(INTEGER_TYPES[flat.element_size()])
