"""SHA-256 of files and tensors: equal only if every byte is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from trainer.exact.shards import whole


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors in the order of their names: for each, its name and then its raw bytes."""
    sha256 = hashlib.sha256()
    for name in sorted(tensors):
        sha256.update(name.encode())
        sha256.update(raw_bytes(tensors[name]))
    return sha256.hexdigest()


def raw_bytes(tensor: Tensor) -> bytes:
    """The elements' bytes in row-major order. Copies to the CPU. A collective for a tensor that is shared out."""
    flat = whole(tensor).detach().cpu().contiguous().reshape(-1)
    if not flat.numel():
        return b""  # an empty tensor has no view of another dtype
    return flat.view(torch.uint8).numpy().tobytes()
