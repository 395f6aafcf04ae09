"""Listens to the marks of `trainer.process.activity` while steps are profiled."""

from __future__ import annotations

from time import perf_counter

from torch.profiler import record_function

from trainer.process.activity import AGREEING, LOADING, Phase, activity

RANGE = "lockstep: "  # begins the names of the ranges in a trace
WAITING = (LOADING, AGREEING)


class WaitClock:
    """Counts the seconds in which a step waits for its samples."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._phase = activity.phase
        self._since = perf_counter()

    def __call__(self, phase: Phase) -> None:
        now = perf_counter()
        if self._phase in WAITING:
            self.seconds += now - self._since
        self._phase = phase
        self._since = now


class PhaseRanges:
    """Makes each phase of a step a named range of the trace."""

    def __init__(self) -> None:
        self._range: record_function | None = None
        self(activity.phase)

    def __call__(self, phase: Phase) -> None:
        self.close()
        self._range = record_function(RANGE + phase.name)
        self._range.__enter__()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None
