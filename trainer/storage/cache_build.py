"""Making the cache of `data.cache=decoded`: by all processes that want it, of this run and of others, together.

Each takes the first chunk that nobody has, until all are there. So nothing that is complete is made twice, whoever was
killed in between, and nobody waits for one who is gone.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import shutil
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from threading import Event, Lock
from typing import Protocol

from trainer.data.bad_samples import is_bad_sample
from trainer.data.image_store import ImageStore, chunk_path
from trainer.errors import ConfigError, DataError, LockstepError, config_error
from trainer.process.free_memory import describe_bytes
from trainer.storage.decoded_cache import (
    CacheSource,
    is_complete,
    open_store,
    write_about,
    write_table,
)
from trainer.storage.files import new_file

KEY = "data.cache_dir"
LOCK_FILE = "lock"
POLL = 0.1  # seconds between looks at what others are making


class Progress(Protocol):
    """Who shows how far a build has come."""

    def begin(self, folder: Path, images: int, size: int) -> None:
        """`images` are still to be decoded; the whole cache takes about `size` bytes."""

    def advance(self, images: int) -> None:
        """So many more are there."""

    def end(self) -> None: ...


def open_or_build(
    cache_dir: Path, source: CacheSource, threads: int, progress: Progress
) -> ImageStore:
    """The cache of `source` below `cache_dir`, made by `threads` threads as far as it is not there.

    Raises `ConfigError` for a folder that cannot be used, `DataError` for an image that cannot be decoded,
    `LockstepError` for a disk that is full.
    """
    folder = cache_dir / source.name
    missing = []
    images = 0
    for chunk in range(source.chunks):
        count = len(source.chunk(chunk))
        if not is_complete(folder, chunk, count):
            missing.append(chunk)
            images += count
    if not missing:
        with suppress(OSError):  # a cache that may only be read
            write_about(folder, source)
        return open_store(folder, source)
    size = source.estimate()
    needed = size * images // len(source.paths)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_space(cache_dir, needed)
        write_about(folder, source)
        progress.begin(folder, images, size)
        try:
            _Build(folder, source, missing, progress).run(threads)
        finally:
            progress.end()
    except OSError as error:
        raise _explain(error, folder, size, source) from None
    return open_store(folder, source)


def _check_space(cache_dir: Path, needed: int) -> None:
    free = shutil.disk_usage(cache_dir).free
    if needed > free:
        raise ConfigError(
            KEY,
            f"{cache_dir} has {describe_bytes(free)} free, and the decoded images need about "
            f"{describe_bytes(needed)} more; name a folder on another disk, make data.short_side smaller, or see "
            f"`python -m trainer cache list {cache_dir}` for what may be cleared",
        )


def _explain(
    error: OSError, folder: Path, size: int, source: CacheSource
) -> LockstepError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return LockstepError(
            f"{KEY}: the disk of {folder} is full ({error.strerror}), and the decoded images need about "
            f"{describe_bytes(size)} in all; make room, or name another folder. What is complete is kept, and the next "
            f"run goes on from it"
        )
    reason = error.strerror or str(error)
    side = source.reading.short_side or "full"
    return config_error(
        KEY,
        f"{folder} cannot be written ({reason}); name a folder that can be, or read the images themselves, which gives "
        f"the same: data.cache=0 data.short_side={side}",
        error,
    )


class _Build:
    """The chunks that are missing from the cache in `folder`."""

    def __init__(
        self, folder: Path, source: CacheSource, missing: list[int], progress: Progress
    ) -> None:
        self._folder = folder
        self._source = source
        self._missing = missing
        self._progress = progress
        self._claims = ChunkClaims(folder)
        self._is_ended = Event()

    def run(self, threads: int) -> None:
        """Make what nobody else makes, and wait for the rest."""
        count = max(1, min(threads, len(self._missing)))
        # Decoding, resizing and hashing release the interpreter lock.
        with self._claims, ThreadPoolExecutor(count) as pool:
            try:
                works = [pool.submit(self._work) for _ in range(count)]
                for work in as_completed(works):
                    work.result()  # the first that fails ends the others
            finally:
                self._is_ended.set()  # also for Ctrl-C, which this thread alone sees

    def _work(self) -> None:
        try:
            while self._missing and not self._is_ended.is_set():
                if not self._make_first_free():
                    self._is_ended.wait(POLL)
        except _Ended:
            pass
        # Also Ctrl-C: the other threads are to end, too.
        except BaseException:
            self._is_ended.set()
            raise

    def _make_first_free(self) -> bool:
        """Make the first missing chunk that nobody is making; False if there is none."""
        # From the first on, so that every process meets a damaged image soon after one has.
        for chunk in list(self._missing):
            if not self._claims.take(chunk):
                continue
            try:
                images = len(self._source.chunk(chunk))
                if not is_complete(self._folder, chunk, images):
                    self._make(chunk)
                # Another thread may have counted it, between the copy of the list and the claim.
                if chunk in self._missing:
                    self._missing.remove(chunk)
                    self._progress.advance(images)
            finally:
                self._claims.release(chunk)
            return True
        return False

    def _make(self, chunk: int) -> None:
        """Decode the images of a chunk, and put it into place."""
        # Of processes that were killed while they wrote its table.
        table = chunk_path(self._folder, chunk, "json").name
        for leftover in self._folder.glob(f".partial.*.{table}"):
            leftover.unlink(missing_ok=True)
        digest = hashlib.sha256()
        sizes = []
        with (
            new_file(chunk_path(self._folder, chunk, "bin")) as partial,
            partial.open("wb") as file,
        ):
            for path in self._source.chunk(chunk):
                if self._is_ended.is_set():
                    raise _Ended
                pixels, size = self._pixels(path)
                digest.update(pixels)
                file.write(pixels)
                sizes.append(size)
        write_table(self._folder, chunk, sizes, digest.hexdigest())

    def _pixels(self, path: str) -> tuple[memoryview, tuple[int, int]]:
        """The bytes of an image, and its height and width; none, of an image that is left out."""
        try:
            image = self._source.decode(path)
        except DataError as error:
            if self._source.reading.leaves_out and is_bad_sample(error):
                return memoryview(b""), (0, 0)
            raise
        pixels = image.permute(1, 2, 0).contiguous()
        return pixels.numpy().data.cast("B"), (pixels.shape[0], pixels.shape[1])


class _Ended(Exception):
    """Another thread has failed, or the process is to end."""


class ChunkClaims:
    """Which chunks of a cache this process is making. A context; what a process has that is killed is let go.

    Byte `i` of the file `lock` is locked for chunk `i`: among processes, of several machines, too. Threads of one
    process do not exclude one another so, and are kept apart here.
    """

    def __init__(self, folder: Path) -> None:
        self._file = (folder / LOCK_FILE).open("ab")
        self._own: set[int] = set()
        self._guard = Lock()

    def __enter__(self) -> ChunkClaims:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def take(self, chunk: int) -> bool:
        """Claim a chunk; False if another has it."""
        with self._guard:
            if chunk in self._own:
                return False
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, chunk)
            except BlockingIOError:
                return False
            except PermissionError:  # some systems say it so
                return False
            self._own.add(chunk)
            return True

    def release(self, chunk: int) -> None:
        with self._guard:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, chunk)
            self._own.discard(chunk)


def is_being_made(folder: Path) -> bool:
    """True if some process is making chunks of the cache in `folder`."""
    try:
        file = (folder / LOCK_FILE).open("ab")
    except OSError:
        return False
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
