"""The working directory, in which relative paths begin."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path


class WorkingDirectory:
    """The process's own at the time this object is made.

    A program may go elsewhere between the making of a Trainer and `fit`, and so may an observer; the paths of the
    config stay where they were.
    """

    def __init__(self, paths: Sequence[str | None]) -> None:
        """`paths` are those of the config. If none of them is relative, the program may work wherever it likes."""
        is_needed = any(map(_is_relative, filter(None, paths)))
        self._path: str | None = _current() if is_needed else None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """A context in which the process is there. It returns to where it was before."""
        before = _current()
        self.enter()
        try:
            yield
        finally:
            if before is not None and before != _current():
                # As below.
                with suppress(OSError):
                    os.chdir(before)

    def enter(self) -> None:
        """Go there, unless the process is there already."""
        if self._path is None or self._path == _current():
            return
        # It may be gone. Whoever opens a file there says so.
        with suppress(OSError):
            os.chdir(self._path)

    def absolute(self, path: Path) -> Path:
        """One of the config's paths, to be used outside of `entered`."""
        return path if self._path is None else Path(self._path) / path


def _is_relative(path: str) -> bool:
    return not Path(path).expanduser().is_absolute()


def _current() -> str | None:
    """None if it was deleted."""
    try:
        # Without a Path of it, which takes longer: it is asked for in every step that somebody observes.
        return os.getcwd()  # noqa: PTH109
    except OSError:
        return None
