"""Whether this process works, though its main thread makes no mark: compiles, reads, downloads, waits for a tool."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

# Shares of one CPU. A thread that sleeps or waits uses none; one that waits for a slow disk, file by file, uses little.
MAIN_THREAD_SHARE = 0.001
PROCESS_SHARE = 0.01
# W&B's process, which idles, uses about a hundredth.
CHILDREN_SHARE = 0.05


class SignsOfLife:
    """Compares the CPU time that was used between two looks. For a thread other than the main one."""

    def __init__(self) -> None:
        self._clock: int | None = None
        main_thread = threading.main_thread().ident
        if hasattr(time, "pthread_getcpuclockid") and main_thread is not None:
            self._clock = time.pthread_getcpuclockid(main_thread)
        self._last_main = self._last_process = self._last_children = 0.0
        self._last_time = time.monotonic()

    def look(self) -> bool:
        """True if this process has worked since the last look."""
        now = time.monotonic()
        seconds = max(now - self._last_time, 1e-9)
        main = 0.0 if self._clock is None else time.clock_gettime(self._clock)
        # Without the thread that looks.
        process = time.process_time() - time.thread_time()
        children = _children_time()
        works = (
            main - self._last_main > MAIN_THREAD_SHARE * seconds
            or process - self._last_process > PROCESS_SHARE * seconds
            or children - self._last_children > CHILDREN_SHARE * seconds
        )
        self._last_time = now
        self._last_main, self._last_process = main, process
        self._last_children = children
        return works


def _children_time() -> float:
    """Seconds of CPU time of all processes below this one."""
    import psutil  # type: ignore[import-untyped]

    seconds = 0.0
    with suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                times = child.cpu_times()
                seconds += times.user + times.system
    return seconds
