"""Copies of tensors in main memory, by several threads, which see at once whether the values are finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainer.exact.finite import wide_sum
from trainer.process.machine import usable_processors

# Bytes at a time: they are still in the core's cache when they are looked at.
PART = 1 << 19
MOST_THREADS = 4  # more of them would wait for the memory
LOOKED_AT = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
)


class Copy(NamedTuple):
    """`source`, on the CPU, is to be copied into `target`, of the same shape and dtype in row-major order."""

    source: Tensor
    target: Tensor


def copy_all(copies: Sequence[Copy], *, look: bool) -> set[int]:
    """Make the copies. With `look`, returns the indices of those that hold finite numbers alone, as sums show it.

    A sum of large values may overflow, so one that is not among them may be finite, too.
    """
    parts: list[tuple[int, Copy]] = []
    for index, copy in enumerate(copies):
        parts += [(index, part) for part in _parts(copy)]
    threads = min(_threads(), len(parts))
    if threads < 2:
        doubtful = _copy_parts(parts, look)
    else:
        shares = [parts[first::threads] for first in range(threads)]
        with ThreadPoolExecutor(threads) as pool:
            found = pool.map(lambda share: _copy_parts(share, look), shares)
            doubtful = set().union(*found)
    if not look:
        return set()
    return set(range(len(copies))) - doubtful


def _threads() -> int:
    """One where torch itself shares the work of each copy: threads of ours would start as many again."""
    if torch.get_num_threads() > 1:
        return 1
    return min(MOST_THREADS, usable_processors())


def _parts(copy: Copy) -> list[Copy]:
    source, target = copy
    if not _is_plain(source):
        return [copy]
    elements = PART * torch.get_num_threads() // source.element_size()
    sources = torch.split(source.view(-1), elements)
    targets = torch.split(target.view(-1), elements)
    return [Copy(*pair) for pair in zip(sources, targets, strict=True)]


def _is_plain(tensor: Tensor) -> bool:
    """True if its bytes in memory are its values in row-major order."""
    return tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())


def _copy_parts(parts: Sequence[tuple[int, Copy]], look: bool) -> set[int]:
    """Make some copies; returns the indices of those of which it is not known that they are finite."""
    doubtful = set()
    uses_numpy = torch.get_num_threads() == 1
    for index, (source, target) in parts:
        if uses_numpy and _is_plain(source):
            # torch takes a tenth more time for it.
            np.copyto(_bytes_of(target), _bytes_of(source))
        else:
            target.copy_(source)
        if look and not _has_finite_sum(source):
            doubtful.add(index)
    return doubtful


def _has_finite_sum(tensor: Tensor) -> bool:
    return tensor.dtype in LOOKED_AT and math.isfinite(wide_sum(tensor).item())


def _bytes_of(tensor: Tensor) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return tensor.view(-1).view(torch.uint8).numpy()
