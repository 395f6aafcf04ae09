"""A digest of a data set's samples, without reading every file: what tells two runs' data apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from trainer.data.datasets import FakeImages, ImageArrays, MapDataset
from trainer.data.folder import ImageFolder
from trainer.errors import DataError
from trainer.storage.files import raw_bytes


def fingerprint(dataset: MapDataset) -> str:
    """SHA-256 of the list of samples.

    In-memory images: their pixels and targets. An image folder: each file's path, size and class; not the pixels.
    Any other data set: its type and length and, where it has them, its `paths`, `samples` and `targets`.
    """
    digest = hashlib.sha256()
    for part in _parts(dataset):
        digest.update(part)
        digest.update(b"\0")
    return digest.hexdigest()


def _parts(dataset: MapDataset) -> Iterator[bytes]:
    if isinstance(dataset, ImageArrays):
        yield f"{dataset.images.dtype} {tuple(dataset.images.shape)}".encode()
        yield raw_bytes(dataset.images)
        yield raw_bytes(dataset.targets)
    elif isinstance(dataset, ImageFolder):
        for path, target in zip(dataset.paths, dataset.targets, strict=True):
            yield f"{path} {_size(dataset.root / path)} {target}".encode()
    elif isinstance(dataset, FakeImages):
        yield repr(dataset).encode()
    else:
        yield f"{type(dataset).__module__}.{type(dataset).__qualname__} {len(dataset)}".encode()
        for name in ("paths", "samples", "targets"):
            yield _plain(getattr(dataset, name, None))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:  # a link to nowhere, for one
        raise DataError(f"{path} cannot be read ({error.strerror}); remove or replace the file") from None


def _plain(value: Any) -> bytes:
    if isinstance(value, torch.Tensor):
        return raw_bytes(value)
    return repr(value).encode() if isinstance(value, list | tuple) else b""
