"""Files and directories that are complete or absent, and a directory's lock."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO
from weakref import WeakSet

LOCK_FILE = ".lock"
REPLACED = (
    ".replaced."  # begins the name of a directory while a new one takes its place
)
# A directory that is renamed so often while it is locked has other owners.
LOCK_ATTEMPTS = 100


def write_text(path: Path, text: str, *, private: bool = False) -> None:
    """Replace a file's contents at once. A `private` file may be read by its owner alone; others follow the umask."""
    with new_file(path) as partial:
        make_file(partial, text, private=private)


def make_file(path: Path, text: str, *, private: bool) -> None:
    """Write a file that is not there yet."""
    if private:
        path.touch(mode=0o600)  # before there is anything to read
    with named_in_errors(path):
        path.write_text(text)


def write_json(path: Path, value: Any) -> None:
    """Replace a file's contents by `value` as indented JSON, at once."""
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextmanager
def named_in_errors(path: Path) -> Iterator[None]:
    """A context whose errors of the system name `path`, where they name no file: those of writing to an open one."""
    try:
        yield
    except OSError as error:
        # An error that somebody raised with a text of their own would lose it.
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path to write to. It replaces `path` when the body ends; if the body fails, `path` stays as it was.

    The yielded path has the suffix of `path`, since some libraries choose a format by it.
    """
    partial = _partial_path(path)
    # Of a process that was killed while it wrote; or a link, which must not be written through.
    partial.unlink(missing_ok=True)
    try:
        with named_in_errors(path):
            yield partial
            sync(partial)
            partial.replace(path)
            sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill. It replaces `path` when the body ends; if the body fails, nothing of it stays.

    What it replaces is deleted only once it stands.
    """
    partial = _partial_path(path)
    replaced = _replaced_path(path)
    # Of a process that was killed while it wrote.
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
    # Not the folder that holds it: a run's own directory that was deleted is not to come back, empty.
    partial.mkdir()
    try:
        with named_in_errors(path):
            yield partial
            for file in partial.iterdir():
                sync(file)
            sync(partial)
            if path.exists():
                path.rename(replaced)
            partial.rename(path)
            sync(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def make_folder(directory: Path, name: str) -> Path:
    """The folder `name`, such as `a/b`, below a `directory` that is there: one that was deleted does not come back."""
    folder = directory
    for part in Path(name).parts:
        folder /= part
        folder.mkdir(exist_ok=True)
    return folder


def sync(path: Path) -> None:
    """Wait until the disk holds a file's contents, or a directory's names.

    Otherwise a crash may leave a renamed file without its contents.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with named_in_errors(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_directory(directory: Path) -> TextIO | None:
    """Lock a directory until the returned file is closed or the process ends; None if another process has the lock.

    The file is empty. A process that is forked off meanwhile, such as a loader's, does not hold the lock.
    """
    for _ in range(LOCK_ATTEMPTS):
        # Not "w": the text is the owner's for as long as it has the lock.
        file = (directory / LOCK_FILE).open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        if is_at(file, directory / LOCK_FILE):
            file.truncate(0)
            _locks.add(file)
            return file
        # Between opening and locking, the directory was renamed, and another one is at its path or will be.
        file.close()
    return None


def is_at(file: TextIO, path: Path) -> bool:
    """True if the file at `path` is this open one."""
    try:
        at_path = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return os.path.samestat(os.fstat(file.fileno()), at_path)


# The locks of this process. A fork shares them, and would keep them after this process has ended.
_locks: WeakSet[TextIO] = WeakSet()


def _release_in_fork() -> None:
    for file in _locks:
        if not file.closed:
            # Another file in its place, so that the descriptor's number stays taken until the object is gone.
            nothing = os.open(os.devnull, os.O_RDWR)
            os.dup2(nothing, file.fileno(), inheritable=False)
            os.close(nothing)
    _locks.clear()


os.register_at_fork(after_in_child=_release_in_fork)


def is_locked(directory: Path) -> bool:
    """True if some process has locked the directory."""
    try:
        file = (directory / LOCK_FILE).open()
    except FileNotFoundError:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _replaced_path(path: Path) -> Path:
    """Where a directory is while a new one takes its place; a process killed just then leaves it there."""
    return path.with_name(f"{REPLACED}{path.name}")


def _partial_path(path: Path) -> Path:
    """Where `path` is written before it is renamed: beside it, as a rename does not cross file systems."""
    return path.with_name(f".partial.{path.name}")
