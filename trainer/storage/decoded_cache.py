"""`data.cache=decoded`: which images a cache holds, where it lies, and whether what is there can be used.

A cache is a folder `<data.cache_dir>/<name>` named after what it holds: the paths, sizes and times of the files, the
short side, and what decoded them. If any of it changes, another cache is made; the old one stays until it is cleared.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from trainer.data.bad_samples import is_bad_sample
from trainer.data.decoders import decoder_name, ignore_warnings_of_pillow
from trainer.data.image_reading import ImageReading
from trainer.data.image_store import ABOUT_FILE, CHANNELS, ImageStore, chunk_path
from trainer.data.names import normal_form
from trainer.errors import DataError
from trainer.storage.contents import file_size
from trainer.storage.files import sync
from trainer.storage.sha256 import file_sha256

FORMAT = 1
# Processes share out the making of a cache by chunks, and each is two files: neither too few nor too many.
SMALLEST_CHUNK = 16  # images
MOST_CHUNKS = 1024
ESTIMATED_FROM = 64  # images


@dataclass(frozen=True)
class CacheSource:
    """The image files of a root, and how each is decoded.

    `paths` are relative to `root`, sorted; `decode` makes an image of one, as `reading` says.
    """

    root: Path
    paths: Sequence[str]
    reading: ImageReading
    decode: Callable[[str], Tensor]

    @property
    def chunk_size(self) -> int:
        """Images of a chunk: a function of their number alone."""
        return max(SMALLEST_CHUNK, -(-len(self.paths) // MOST_CHUNKS))

    @property
    def chunks(self) -> int:
        return -(-len(self.paths) // self.chunk_size)

    def chunk(self, number: int) -> Sequence[str]:
        """The paths of a chunk's images."""
        first = number * self.chunk_size
        return self.paths[first : first + self.chunk_size]

    @cached_property
    def about(self) -> dict[str, Any]:
        """What the cache holds. Reads the size and times of every file."""
        return {
            "format": FORMAT,
            "images": len(self.paths),
            "chunk_size": self.chunk_size,
            "short_side": self.reading.short_side,
            "max_pixels": self.reading.max_pixels,
            "decode_short_side": self.reading.decode_short_side,
            "decoded_by": decoder_versions(),
            "files": self._files_sha256(),
        }

    @cached_property
    def name(self) -> str:
        """The cache's folder: for people the root's name and the short side, and the digest of `about`."""
        digest = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode())
        size = (
            "full" if self.reading.short_side is None else str(self.reading.short_side)
        )
        return f"{self.root.resolve().name or 'root'}-{size}-{digest.hexdigest()[:16]}"

    def _files_sha256(self) -> str:
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(f"{normal_form(path)} {self._state(path)}\n".encode())
        return digest.hexdigest()

    def _state(self, path: str) -> str:
        """A file's size and times. Nobody can set back the time of its last change, only that of its contents."""
        file = self.root / path
        try:
            file_size(file)
            state = file.stat()
        except (DataError, OSError) as error:
            is_unreadable = isinstance(error, OSError) or is_bad_sample(error)
            if self.reading.leaves_out and is_unreadable:
                return "none"
            raise
        return f"{state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}"

    def estimate(self) -> int:
        """About how many bytes the images take, from the headers of some."""
        sizes = []
        step = max(1, len(self.paths) // ESTIMATED_FROM)
        ignore_warnings_of_pillow()
        for path in self.paths[::step]:
            file = self.root / path
            if not file.is_file():
                continue  # to open a pipe might take for ever
            # Anything may be wrong with a file; the build tells of it.
            with suppress(Exception), Image.open(file) as image:
                sizes.append(self._decoded_size(*image.size))
        return sum(sizes) * len(self.paths) // max(1, len(sizes))

    def _decoded_size(self, width: int, height: int) -> int:
        scale = 1.0
        if self.reading.short_side is not None:
            scale = min(1.0, self.reading.short_side / min(width, height))
        pixels = round(width * scale) * round(height * scale)
        return pixels * CHANNELS


def decoder_versions() -> dict[str, str]:
    """What the pixels of a file depend on: its decoders, and torch, which resizes."""
    libraries = ("torch", "pillow", decoder_name())
    return {library: version(library) for library in libraries}


def is_complete(folder: Path, chunk: int, images: int) -> bool:
    """True if a chunk of so many images is there as it was written.

    Its size and time say so; where the time is another, its SHA-256 does, as in a cache that was copied.
    """
    pixels = chunk_path(folder, chunk, "bin")
    table_path = chunk_path(folder, chunk, "json")
    try:
        table = json.loads(table_path.read_text())
        state = pixels.stat()
        sides = list(zip(table["heights"], table["widths"], strict=True))
        pixels_of_all = sum(height * width for height, width in sides)
        size = pixels_of_all * CHANNELS
        if len(sides) != images or not state.st_size == table["bytes"] == size:
            return False
        if state.st_mtime_ns == table["mtime_ns"]:
            return True
        if file_sha256(pixels) != table["sha256"]:
            return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    with suppress(OSError):  # a cache that may only be read is hashed every time
        _replace(table_path, table | {"mtime_ns": state.st_mtime_ns})
    return True


def write_about(folder: Path, source: CacheSource) -> None:
    """Write what the cache in `folder` holds, if it does not say so yet."""
    if read_about(folder) is None:
        about = {"root": str(source.root.resolve()), **source.about}
        _replace(folder / ABOUT_FILE, about)


def read_about(folder: Path) -> dict[str, Any] | None:
    """What the cache in `folder` says that it holds; None where it does not say so, or is no cache."""
    try:
        about = json.loads((folder / ABOUT_FILE).read_text())
    except (OSError, ValueError):
        return None
    keys = {"images", "chunk_size", "short_side", "root", "files"}
    if not isinstance(about, dict) or not keys <= about.keys():
        return None
    numbers = (about["images"], about["chunk_size"])
    is_sound = all(isinstance(number, int) and number > 0 for number in numbers)
    return about if is_sound else None


def _replace(path: Path, value: Any) -> None:
    """Replace a file's contents by `value` as JSON, as several processes may do at once."""
    partial = path.with_name(
        f".partial.{socket.gethostname()}.{os.getpid()}.{path.name}"
    )
    try:
        partial.write_text(json.dumps(value))
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def open_store(folder: Path, source: CacheSource) -> ImageStore:
    """The complete cache in `folder`. Notes that it was used."""
    with suppress(OSError):
        os.utime(folder / ABOUT_FILE)
    return ImageStore(folder, source.paths, source.chunk_size)


def write_table(
    folder: Path, chunk: int, sizes: list[tuple[int, int]], sha256: str
) -> None:
    """Write the sizes of a chunk's images, `(height, width)`: from then on it counts as complete."""
    state = chunk_path(folder, chunk, "bin").stat()
    table = {
        "bytes": state.st_size,
        "mtime_ns": state.st_mtime_ns,
        "sha256": sha256,
        "heights": [height for height, _ in sizes],
        "widths": [width for _, width in sizes],
    }
    _replace(chunk_path(folder, chunk, "json"), table)
