"""An observer that ends the run: after some minutes of a session."""

from __future__ import annotations

from time import monotonic

from trainer import Observer, Run, Step


class TimeLimit(Observer):
    """Ends the run by its own end, with an evaluation and a summary, when a session has taken `minutes`."""

    def __init__(self, minutes: float) -> None:
        self.minutes = minutes

    def begin(self, run: Run) -> None:
        self.run = run
        self.start = monotonic()

    def step(self, step: Step) -> None:
        """Clocks differ between ranks, so it is rank 0's that counts."""
        if monotonic() - self.start > 60 * self.minutes:
            self.run.stop(f"the limit of {self.minutes:g} minutes")
