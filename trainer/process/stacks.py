"""Where threads stand: the line of this project's or the user's code, and whole stacks into a file."""

from __future__ import annotations

import faulthandler
import os
import re
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO

from trainer.process.activity import activity

SECONDS_TO_WRITE = 3.0  # the run's disk may be what hangs
FOLDER = "hang"  # in the run's directory
PACKAGE = str(Path(__file__).parents[1])
OWN_ROOM = str(Path(__file__).parent)
# As faulthandler writes them: a thread with the lines below it, and one of these.
STACK = re.compile(r"hread (0x[0-9a-f]+) \(most recent call first\):\n((?:  .*\n)*)")
STACK_LINE = re.compile(r'File "(.*)", line (\d+) in (.*)')
LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))


def main_thread_position() -> str:
    """Where the main thread stands: file, line and function of the innermost code that is no library's.

    Where it waits for another thread, where that one stands.
    """
    thread = activity.waits_for_thread or threading.main_thread().ident or 0
    places = _places(thread)
    own = [place for place in places if not is_library(place[0])]
    chosen = own or places
    if not chosen:
        return "an unknown place"
    path, line, function = chosen[0]
    return f"{short_path(path)}:{line} in {function}"


def _places(thread: int) -> list[tuple[str, str, str]]:
    """File, line and function of each frame of a thread, innermost first.

    As faulthandler prints them. Frames of a thread that runs are not to be touched from another one: CPython 3.11
    crashed where `f_back` was asked for.
    """
    for heading, frames in STACK.findall(_all_stacks()):
        if int(heading, 16) == thread:
            return STACK_LINE.findall(frames)
    return []


def _all_stacks() -> str:
    with _scratch_file() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")


def _scratch_file() -> IO[bytes]:
    """In memory where there is such a thing: a disk may be what hangs."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("lockstep-position"), "w+b")
    return tempfile.TemporaryFile()


def error_position(traceback: TracebackType | None) -> str:
    """Where an error was raised: file, line and function of the innermost code that is no library's."""
    frames: list[tuple[FrameType, int]] = []
    # Where it was caught may be a library's code or this room's, so the callers count too.
    outermost = sys._getframe() if traceback is None else traceback.tb_frame
    caller = outermost.f_back
    while caller is not None:
        frames.append((caller, caller.f_lineno))
        caller = caller.f_back
    while traceback is not None:
        frames.insert(0, (traceback.tb_frame, traceback.tb_lineno))
        traceback = traceback.tb_next
    return _describe(frames)


def _describe(frames: list[tuple[FrameType, int]]) -> str:
    """The first of `frames`, innermost first, that says something to the user."""
    own = [entry for entry in frames if not is_library(entry[0].f_code.co_filename)]
    chosen = own or frames
    if not chosen:
        return "an unknown place"
    frame, line = chosen[0]
    code = frame.f_code
    return f"{short_path(code.co_filename)}:{line} in {code.co_name}"


def is_library(path: str) -> bool:
    """True for a file of a library, and of this room, which waits on behalf of its callers."""
    if path.startswith(PACKAGE):
        return path.startswith(OWN_ROOM)
    return path.startswith("<frozen") or path.startswith(LIBRARIES)


def short_path(path: str) -> str:
    """A path below the working directory without it."""
    with suppress(ValueError, OSError):
        return str(Path(path).relative_to(Path.cwd()))
    return path


def write_stacks(
    directory: Path | None, name: str, workers: Mapping[int, str]
) -> Path | None:
    """Write the stacks of all threads, and those of loader processes; returns the file, None if none takes them."""

    def write(path: Path) -> None:
        with path.open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0, 2)
            for process, stack in workers.items():
                file.write(f"\nLoader process {process}:\n{stack}")

    return write_in(directory, name, write)


def write_in(
    directory: Path | None, name: str, write: Callable[[Path], None]
) -> Path | None:
    """The file that `write` has written, below the run's directory or else among temporary files; None if neither.

    Each has a few seconds: a disk may be what hangs.
    """

    def in_run() -> Path:
        if directory is None or not directory.is_dir():
            raise FileNotFoundError  # not open yet, or on a machine that does not see it
        folder = directory / FOLDER
        folder.mkdir(exist_ok=True)
        return folder

    def in_temporary_files() -> Path:
        return Path(tempfile.mkdtemp(prefix="lockstep-hang-"))

    for make_folder in (in_run, in_temporary_files):
        written: list[Path] = []

        def try_to_write(
            make_folder: Callable[[], Path] = make_folder,
            written: list[Path] = written,
        ) -> None:
            with suppress(OSError, RuntimeError, AttributeError):
                path = make_folder() / name
                write(path)
                written.append(path)

        thread = threading.Thread(target=try_to_write, daemon=True, name="stacks")
        thread.start()
        thread.join(SECONDS_TO_WRITE)
        if written:
            return written[0]
    return None


@contextmanager
def stacks_on_crash() -> Iterator[None]:
    """A context in which a signal such as SIGSEGV prints the stacks of all threads to stderr."""
    was_enabled = faulthandler.is_enabled()
    if not was_enabled:
        # Where stderr is no file, there is nothing to write to.
        with suppress(AttributeError, OSError, ValueError, RuntimeError):
            faulthandler.enable()
    try:
        yield
    finally:
        if not was_enabled:
            faulthandler.disable()
