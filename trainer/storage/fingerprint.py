"""A fingerprint of a data set: tells two runs' samples apart without reading every file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.data.datasets import FakeImages, ImageArrays, MapDataset
from trainer.data.folder import ImageFolder
from trainer.errors import DataError
from trainer.storage.sha256 import raw_bytes

QUICK_SAMPLES = 64


def fingerprint(dataset: MapDataset) -> str:
    """SHA-256 of the list of samples.

    In-memory images: their pixels and targets. An image folder: each file's path, size and class, but no pixels.
    Any other data set: its type and length and, where it has them, its `paths`, `samples` and `targets`.
    """
    sha256 = hashlib.sha256()
    for part in _parts(dataset):
        sha256.update(part)
        sha256.update(b"\0")
    return sha256.hexdigest()


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


def _parts(dataset: MapDataset) -> Iterator[bytes]:
    if isinstance(dataset, ImageArrays):
        yield from _array_parts(dataset)
    elif isinstance(dataset, ImageFolder):
        yield from _folder_parts(dataset)
    elif isinstance(dataset, FakeImages):
        yield repr(dataset).encode()
    else:
        yield from _other_parts(dataset)


def _array_parts(dataset: ImageArrays) -> Iterator[bytes]:
    images = dataset.images
    yield f"{images.dtype} {tuple(images.shape)}".encode()
    yield raw_bytes(images)
    yield raw_bytes(dataset.targets)


def _folder_parts(dataset: ImageFolder) -> Iterator[bytes]:
    for path, target in zip(dataset.paths, dataset.targets, strict=True):
        size = _file_size(dataset.root / path)
        yield f"{path} {size} {target}".encode()


def _other_parts(dataset: MapDataset) -> Iterator[bytes]:
    kind = type(dataset)
    yield f"{kind.__module__}.{kind.__qualname__} {len(dataset)}".encode()
    for name in ("paths", "samples", "targets"):
        yield _attribute_bytes(getattr(dataset, name, None))


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:  # a dangling link, for example
        raise DataError(
            f"{path} cannot be read ({error.strerror}); remove or replace the file"
        ) from None


def _attribute_bytes(value: Any) -> bytes:
    """The bytes of a tensor or a list; none of any other value, whose text may name a memory address."""
    if isinstance(value, Tensor):
        return raw_bytes(value)
    if isinstance(value, list | tuple):
        return repr(value).encode()
    return b""
