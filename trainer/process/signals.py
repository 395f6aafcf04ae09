"""SIGTERM and its like become a stop at a step boundary, the same one on all ranks."""

from __future__ import annotations

import _thread
import math
import signal
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any

from trainer.process.command import STOP_SIGNALS, is_command
from trainer.process.ranks import Ranks
from trainer.process.watchdog import current_watchdog

# Where steps become a hundred times longer all at once, the answer comes within 10 s: launchers kill after 30 s.
SECONDS_BETWEEN_ANSWERS = 0.1
MOST_STEPS_BETWEEN_ANSWERS = 64


class StopRequest:
    """A context that turns the first signal into a request to stop. `signal_number` is that signal, 0 before it.

    After it a SIGINT (a second Ctrl-C) acts at once, while further signals change nothing: one stop may bring
    several, as a launcher passes its own on and then ends, and so does the agent above it.

    Ranks are signalled at different moments, so they ask one another. They ask when a step begins and read the answer
    when it ends, which hides some of the cost behind the step. Where steps are short, that is not done in every one:
    each answer also says how many steps are to pass before the next, by the clock of rank 0. That begins anew with each
    epoch, in which parameters may be thawed, or samples be others.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._is_alone = ranks.count == 1
        self._steps_to_pass = 0  # before the next question
        self._interval = 1  # steps from one answer to the next
        self._time_of_question = -math.inf
        self._answer: Callable[[], list[int]] | None = None
        self._previous_handlers: dict[int, Any] = {}
        self._hearing: AbstractContextManager[None] = nullcontext()
        # Held by a thread that calls `stop` while it signals: the handlers stay what it found.
        self._handlers_stay = threading.Lock()
        self.signal_number = 0
        if not self._is_alone:
            self._ask()

    def __enter__(self) -> StopRequest:
        # Python allows handlers in no other thread.
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                # Under nohup a run is to outlive its terminal.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    handler = signal.signal(number, self._handle)
                    self._previous_handlers[number] = handler
            watchdog = current_watchdog()
            if watchdog is not None:
                # It ends the run where this thread waits for something that does not come.
                self._hearing = watchdog.hear(STOP_SIGNALS)
        self._hearing.__enter__()
        _current.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._answer is not None:
            # Every rank has asked: none may leave while another waits for an answer.
            self._answer()
        _current.remove(self)
        self._hearing.__exit__(None, None, None)
        is_last = kind is not None and is_command()
        with self._handlers_stay:
            for number, handler in self._previous_handlers.items():
                # A command that fails has a message to write yet; its handler of SIGINT knows.
                keeps = is_last and number != signal.SIGINT
                signal.signal(number, signal.SIG_IGN if keeps else handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.signal_number:
            return
        self.signal_number = number
        interrupt = self._previous_handlers.get(signal.SIGINT)
        if interrupt is not None:
            signal.signal(signal.SIGINT, interrupt)

    def agreed(self, *, begins_epoch: bool = False) -> bool:
        """True if all ranks stop after this step. Called by every rank once a step; whether an epoch began with it."""
        if self._is_alone:
            return self.signal_number != 0
        if begins_epoch and self._steps_to_pass:
            self._steps_to_pass = self._interval = 1
            self._time_of_question = -math.inf
        if self._steps_to_pass:
            self._steps_to_pass -= 1
        elif self._read_answer():
            if not self.signal_number:
                self.signal_number = signal.SIGTERM  # only another rank was signalled
            return True
        if not self._steps_to_pass:
            self._ask()
        return False

    def _ask(self) -> None:
        """Ask whether any rank is to stop, and rank 0 for the steps from this answer to the next."""
        interval = self._next_interval() if self._ranks.is_main else 0
        is_signalled = self.signal_number != 0
        self._answer = self._ranks.largest_each_async([is_signalled, interval])

    def _read_answer(self) -> bool:
        assert self._answer is not None
        stop, self._interval = self._answer()
        self._answer = None
        self._steps_to_pass = self._interval - 1
        return bool(stop)

    def _next_interval(self) -> int:
        now = time.monotonic()
        seconds_a_step = (now - self._time_of_question) / self._interval
        self._time_of_question = now
        fitting = int(SECONDS_BETWEEN_ANSWERS / max(seconds_a_step, 1e-6))
        # Steps may become longer all at once.
        return max(1, min(fitting, 2 * self._interval, MOST_STEPS_BETWEEN_ANSWERS))

    def stop(self) -> None:
        """Ask for the stop as a SIGTERM does. May be called in any thread."""
        with self._handlers_stay:
            if signal.getsignal(signal.SIGTERM) == self._handle:
                # Python's own record of a signal, whose handler the main thread calls next. A real signal may arrive
                # when the run is over and the handlers are those before it, and would end the process.
                _thread.interrupt_main(signal.SIGTERM)
            elif not self.signal_number:
                self.signal_number = signal.SIGTERM  # no signal can be heard


# Those that are entered, in this process.
_current: list[StopRequest] = []


def stop_run() -> None:
    """Stop the run of this process at a step boundary, if it is in one. May be called in any thread."""
    for request in _current:
        request.stop()
