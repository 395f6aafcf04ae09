"""SIGTERM, SIGINT → a stop at a step boundary that all ranks agree on."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from trainer.process.ranks import Ranks


class StopRequest:
    """Turns the first signal into a flag. After it a SIGINT (a second Ctrl-C) acts at once, a SIGTERM changes nothing.

    One stop may bring several SIGTERMs: a launcher passes its own on, then ends, and so does the agent above it.

    The ranks are signalled at different moments, so each asks the others once a step. The question goes out
    when the step begins and is answered when it ends: its cost is hidden behind the step.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._question = None if ranks.count == 1 else ranks.any_rank_async(False)
        self.signal_number = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._question is not None:
            self._question.result()  # every rank asked: none may leave while another waits for its answer
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if not self.signal_number:
            self.signal_number = number
            signal.signal(signal.SIGINT, self._previous[signal.SIGINT])

    def agreed(self) -> bool:
        """Whether to stop now: at this step on every rank, or on none."""
        if self._question is None:
            return self.signal_number != 0
        answer = self._question.result()
        self._question = None if answer else self._ranks.any_rank_async(self.signal_number != 0)
        if answer and not self.signal_number:
            self.signal_number = signal.SIGTERM
        return answer
