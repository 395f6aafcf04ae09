"""SIGTERM and SIGINT become a stop at a step boundary, the same one on all ranks."""

from __future__ import annotations

import signal
import threading
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any

from trainer.process.ranks import Agreement, Ranks
from trainer.process.watchdog import current_watchdog

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """A context that turns the first signal into a request to stop. `signal_number` is that signal, 0 before it.

    After it a SIGINT (a second Ctrl-C) acts at once, while further SIGTERMs change nothing: one stop may bring
    several, as a launcher passes its own on and then ends, and so does the agent above it.

    Ranks are signalled at different moments, so each asks the others once a step. It asks when the step begins and
    reads the answer when the step ends, which hides the cost behind the step.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._answer: Agreement | None = None
        if ranks.count > 1:
            self._answer = ranks.any_rank_async(False)
        self._previous_handlers: dict[int, Any] = {}
        self._hearing: AbstractContextManager[None] = nullcontext()
        self.signal_number = 0

    def __enter__(self) -> StopRequest:
        # Python allows handlers in no other thread.
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._previous_handlers[number] = signal.signal(number, self._handle)
            watchdog = current_watchdog()
            if watchdog is not None:
                # It ends the run where this thread waits for something that does not come.
                self._hearing = watchdog.hear(STOP_SIGNALS)
        self._hearing.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._answer is not None:
            # Every rank has asked: none may leave while another waits for an answer.
            self._answer.result()
        self._hearing.__exit__(None, None, None)
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.signal_number:
            return
        self.signal_number = number
        signal.signal(signal.SIGINT, self._previous_handlers[signal.SIGINT])

    def agreed(self) -> bool:
        """True if all ranks stop after this step. Called by every rank once a step."""
        if self._answer is None:
            return self.signal_number != 0
        stop = self._answer.result()
        if not stop:
            self._answer = self._ranks.any_rank_async(self.signal_number != 0)
            return False
        self._answer = None
        if not self.signal_number:
            self.signal_number = signal.SIGTERM  # only another rank was signalled
        return True
