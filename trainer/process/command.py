"""The process of a command ends with one message, and signals that come while it ends change nothing.

Ctrl-C may be pressed again and again. A launcher sends a SIGTERM to the ranks that are left as soon as one has ended,
which is when they are about to say why.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# What ends the process takes less. After it an interrupt acts again, as Python drops one that came at a bad moment.
SECONDS_TO_END = 10.0
# Those of which the first stops a run. SIGHUP comes where a terminal is closed; SIGUSR1 is what Slurm's users ask for
# before their time is up.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class OneInterrupt:
    """A handler of SIGINT that raises `KeyboardInterrupt`, and once more only if that did not end the process."""

    def __init__(self) -> None:
        self._time = -SECONDS_TO_END

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._time < SECONDS_TO_END:
            return
        self._time = now
        raise KeyboardInterrupt


_is_command = threading.Event()


def begin_command() -> None:
    """Tell that this process runs a command, after which it ends: a Ctrl-C raises one `KeyboardInterrupt`.

    Under nohup and its like, where SIGINT is ignored, it stays so.
    """
    _is_command.set()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, OneInterrupt())


def is_command() -> bool:
    """True if this process runs a command, and not a program or a notebook that goes on after a run."""
    return _is_command.is_set()


@contextmanager
def signals_ignored() -> Iterator[None]:
    """While the body reports how the process ends, a signal would only cut the message short.

    They stay ignored in the process of a command.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {
        number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS
    }
    try:
        yield
    finally:
        if not is_command():
            for number, handler in handlers.items():
                signal.signal(number, handler)
