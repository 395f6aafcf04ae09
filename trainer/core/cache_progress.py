"""How far the making of a cache of decoded images has come: a bar in a terminal, else a line before and after."""

from __future__ import annotations

import sys
from pathlib import Path
from time import monotonic
from typing import Any

from trainer.process.terminal import is_terminal

MB = 10**6


class NoProgress:
    """For the ranks that say nothing."""

    def begin(self, folder: Path, images: int, size: int) -> None:
        pass

    def advance(self, images: int) -> None:
        pass

    def end(self) -> None:
        pass


class BuildProgress:
    """On standard error, since it is no part of a run's output."""

    def begin(self, folder: Path, images: int, size: int) -> None:
        self._start = monotonic()
        self._images = images
        self._done = 0
        self._bar: Any = None
        print(
            f"data.cache=decoded: {images:,} images are decoded into {folder}, which takes about {size / MB:,.0f} MB",
            file=sys.stderr,
            flush=True,
        )
        if is_terminal(sys.stderr):
            self._bar = _terminal_bar(images)
            self._bar.start()

    def advance(self, images: int) -> None:
        self._done += images
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], images)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        print(
            f"data.cache=decoded: {self._done:,} of {self._images:,} images in {monotonic() - self._start:.1f} s",
            file=sys.stderr,
            flush=True,
        )


def _terminal_bar(images: int) -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("decoding"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    bar.add_task("decoding", total=images)
    return bar
