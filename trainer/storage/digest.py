"""A digest of a model's weights that is cheap enough for every log interval.

Each element's bits and its position are mixed into 64 bits, and these are added up in integers, which wrap and do not
round: the sum is the same in any order. It stays on the device until somebody reads it, 8 bytes. It tells runs
apart; it is no cryptographic hash (`summary.json` has those).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

CHUNK = 1 << 22  # elements mixed at a time: what bounds the memory it takes
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of an element
GOLDEN, MIXER = -7046029254386353131, -4658895280553007687  # 0x9E3779B97F4A7C15 and 0xBF58476D1CE4E5B9, signed


@torch.no_grad()
def digest(tensors: Mapping[str, Tensor]) -> Tensor:
    """A 0-dim int64 tensor, on the device of the tensors, of all bits of `tensors` in the order of their names.

    The mixing is a round of splitmix64's (Steele, Lea and Flood, 2014, "Fast splittable pseudorandom number
    generators").
    """
    total, position = torch.zeros((), dtype=torch.int64), 0
    for bits in _chunks(tensors):
        mixed = torch.arange(position + 1, position + 1 + len(bits), device=bits.device).mul_(GOLDEN).bitwise_xor_(bits)
        mixed.mul_(MIXER)
        total = total.to(bits.device) + mixed.bitwise_xor_(mixed >> 32).sum()
        position += len(bits)
    return total


def hexadecimal(value: Tensor) -> str:
    """What logs show of a digest: 16 hexadecimal digits. Waits for the device."""
    return f"{int(value.item()) % (1 << 64):016x}"


def _chunks(tensors: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """The bits of all elements as int64, small tensors joined and large ones cut."""
    waiting: list[Tensor] = []
    for name in sorted(tensors):
        flat = tensors[name].detach().reshape(-1)
        flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
        for part in torch.split(flat.view(BITS[flat.element_size()]), CHUNK):
            waiting.append(part)
            if sum(map(len, waiting)) >= CHUNK:
                yield torch.cat(waiting).long()
                waiting = []
    if waiting:
        yield torch.cat(waiting).long()
