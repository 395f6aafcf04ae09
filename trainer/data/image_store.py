"""Decoded images in files, mapped into memory: the processes of a machine share them through the page cache.

A store is a folder of chunks. `00000.bin` holds the pixels of the first images one after another, uint8 `(H, W, 3)`
each, and `00000.json` their sizes. `trainer.storage.decoded_cache` makes it.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from trainer.errors import DataError

ABOUT_FILE = "about.json"
CHANNELS = 3  # images are stored in colour, whatever their files hold


def chunk_path(folder: Path, chunk: int, suffix: str) -> Path:
    """A file of a chunk: `bin`, the pixels, or `json`, the sizes."""
    return folder / f"{chunk:05d}.{suffix}"


class ImageStore:
    """The images of a complete store, by number. `paths` are those of their files, in order.

    While it is in use, `about.json` is locked (shared), by which who deletes stores knows. It may be sent to another
    process, which maps the files anew.
    """

    def __init__(self, folder: Path, paths: Sequence[str], chunk_size: int) -> None:
        self.folder = folder
        self.numbers = {path: number for number, path in enumerate(paths)}
        self._chunks = -(-len(paths) // chunk_size)
        self._chunk_size = chunk_size
        self._open()

    @property
    def size(self) -> int:
        """Bytes of all images."""
        return sum(pixels.numel() for pixels in self._maps)

    def _open(self) -> None:
        self._lock: TextIO | None = None
        with suppress(OSError):  # a file system may have no locks
            self._lock = (self.folder / ABOUT_FILE).open()
            fcntl.flock(self._lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        self._maps: list[Tensor] = []
        heights: list[int] = []
        widths: list[int] = []
        try:
            for chunk in range(self._chunks):
                table = json.loads(chunk_path(self.folder, chunk, "json").read_text())
                heights += table["heights"]
                widths += table["widths"]
                self._maps.append(_mapped(self.folder, chunk, table["bytes"]))
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise DataError(
                f"{self.folder}, the decoded images of data.cache_dir, cannot be read ({error}): was it deleted while "
                f"the run used it? Start the run again, which makes it anew"
            ) from None
        self._heights = np.array(heights, np.int64)
        self._widths = np.array(widths, np.int64)
        self._starts = self._find_starts()

    def _find_starts(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Where each image begins in its chunk."""
        sizes = self._heights * self._widths * CHANNELS
        starts = np.zeros(len(sizes), np.int64)
        for first in range(0, len(sizes), self._chunk_size):
            of_chunk = sizes[first : first + self._chunk_size]
            end = first + len(of_chunk)
            # The first image begins at 0, and every other one where the one before it ends.
            ends = np.cumsum(of_chunk)
            starts[first + 1 : end] = ends[:-1]
        return starts

    def image(self, number: int) -> Tensor | None:
        """The image, uint8 `(3, H, W)`, not to be written into; None for one that could not be decoded."""
        height, width = int(self._heights[number]), int(self._widths[number])
        if not height:
            return None
        pixels = self._maps[number // self._chunk_size]
        return pixels.as_strided(
            (CHANNELS, height, width),
            (1, width * CHANNELS, CHANNELS),
            int(self._starts[number]),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {
            "folder": self.folder,
            "numbers": {},  # an image folder has looked up its own
            "_chunks": self._chunks,
            "_chunk_size": self._chunk_size,
        }

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def _mapped(folder: Path, chunk: int, size: int) -> Tensor:
    """The bytes of a chunk, mapped from its file."""
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    path = chunk_path(folder, chunk, "bin")
    # Private: what is written here by mistake never reaches the file.
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
