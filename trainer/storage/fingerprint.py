"""A fingerprint of a data set: tells two runs' samples apart without reading every file."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from trainer.data.datasets import ImageArrays, MapDataset
from trainer.storage.contents import columns
from trainer.storage.sha256 import raw_bytes

# Few: ranks compare them before every run.
QUICK_SAMPLES = 64
# By which a first difference is found; an integer power of two of samples share one.
MOST_BLOCKS = 1024
# Of ids beyond, no counts by class are kept.
MOST_CLASSES = 2000


@dataclass(frozen=True)
class Fingerprint:
    """Of one part of a data set: all of it as one SHA-256, and enough to say what changed.

    Attributes:

    - `samples`: how many there are.
    - `sha256`: of the number and what `trainer.storage.contents` tells of the samples.
    - `block_size` and `blocks`: a short SHA-256 of every so many samples, in order.
    - `by_class`: samples of each class id, where the data set has a list of `targets`.
    """

    samples: int
    sha256: str
    block_size: int
    blocks: list[str]
    by_class: dict[str, int] | None


def fingerprint(dataset: MapDataset, block_size: int | None = None) -> Fingerprint:
    """The fingerprint of a data set's samples. With another's `block_size`, their blocks can be compared."""
    count = len(dataset)
    if block_size is None:
        block_size = 1
        while block_size * MOST_BLOCKS < count:
            block_size *= 2
    of_dataset = columns(dataset)
    whole = hashlib.sha256(str(count).encode())
    if not of_dataset:
        whole.update(type(dataset).__qualname__.encode())
    blocks = []
    for first in range(0, count, block_size):
        sha256 = hashlib.sha256()
        for column in of_dataset:
            sha256.update(column(first, min(first + block_size, count)) + b"\0")
        whole.update(sha256.digest())
        blocks.append(sha256.hexdigest()[:16])
    return Fingerprint(
        count, whole.hexdigest(), block_size, blocks, _count_classes(dataset)
    )


def _count_classes(dataset: MapDataset) -> dict[str, int] | None:
    targets = getattr(dataset, "targets", None)
    if isinstance(targets, Tensor | np.ndarray):
        is_column = targets.ndim == 1
        targets = targets.tolist() if is_column else None
    if not isinstance(targets, list) or len(targets) != len(dataset):
        return None
    if not all(isinstance(target, int) for target in targets):
        return None
    counts = Counter(targets)
    if len(counts) > MOST_CLASSES:
        return None
    return {str(target): counts[target] for target in sorted(counts)}


def quick_fingerprint(dataset: MapDataset) -> str:
    """SHA-256 of the number of samples and of a few of them, spread evenly: milliseconds for any size.

    In-memory images: pixels and target of each. An image folder: path and class. Others: what `fingerprint` takes of
    them, of those few. Reads no file.
    """
    count = len(dataset)
    sha256 = hashlib.sha256(f"{type(dataset).__qualname__} {count}".encode())
    for index in range(0, count, max(1, count // QUICK_SAMPLES)):
        for part in _quick_parts(dataset, index):
            sha256.update(part)
            sha256.update(b"\0")
    return sha256.hexdigest()


def _quick_parts(dataset: MapDataset, index: int) -> Iterator[bytes]:
    if isinstance(dataset, ImageArrays):
        yield raw_bytes(dataset.images[index])
    # No `samples`: they are often whole paths, which may differ between machines that hold the same files.
    for name in ("paths", "targets"):
        values = getattr(dataset, name, None)
        if isinstance(values, Tensor):
            yield raw_bytes(values[index])
        elif isinstance(values, list | tuple):
            yield repr(values[index]).encode()
