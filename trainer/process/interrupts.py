"""Ctrl-C in a command: one acts, and those that are pressed while the process ends change nothing."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# What ends the process takes less. After it an interrupt acts again, as Python drops one that came at a bad moment.
SECONDS_TO_END = 10.0


class OneInterrupt:
    """A handler of SIGINT that raises `KeyboardInterrupt`, and once more only if that did not end the process."""

    def __init__(self) -> None:
        self._time = -SECONDS_TO_END
        self._is_ending = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._is_ending or now - self._time < SECONDS_TO_END:
            return
        self._time = now
        raise KeyboardInterrupt

    def end(self) -> None:
        """From now on raise nothing: the process ends."""
        self._is_ending = True


def interrupt_once() -> None:
    """Have a Ctrl-C raise one `KeyboardInterrupt`. For the process of a command, at its start.

    Under nohup and its like, where SIGINT is ignored, it stays so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, OneInterrupt())


@contextmanager
def interrupts_ignored() -> Iterator[None]:
    """While the body reports how the process ends, a Ctrl-C would only put a traceback in place of the message."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        if isinstance(previous, OneInterrupt):
            previous.end()
        signal.signal(signal.SIGINT, previous)
