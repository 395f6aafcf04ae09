"""One tracker in a thread of its own: whatever it does, training goes on, and one warning says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

from trainer.config.component_lists import TrackerConfig
from trainer.errors import LockstepError
from trainer.reporting.formats import shorten_error
from trainer.reporting.trackers.base import Ending, Row, Session, Tracker
from trainer.reporting.trackers.received import Received

Note = Callable[[str], None]  # shows one line to the user


class TrackerWorker:
    """Calls a tracker's methods, in order, in a thread. `key` is its place in the config, as `trackers[0]`.

    No failure of the tracker is raised: `note` reports the first, and nothing more is sent. With `strict` it is raised
    as a `LockstepError`, by the next call after it.
    """

    def __init__(
        self, tracker: Tracker, section: TrackerConfig, key: str, note: Note
    ) -> None:
        self.label = section.name
        self._tracker = tracker
        self._section = section
        self._key = key
        self._note = note
        self._queue: SimpleQueue[Callable[[], Any] | Event | None] = SimpleQueue()
        self._error: Exception | None = None
        self._is_reported = False
        self._received: Received | None = None
        self._place = "failed"  # where the rows go, once it has begun

    def begin(self, session: Session, state_file: Path) -> str:
        """Begin the session; returns where the rows go, in words."""
        received = self._received = Received(state_file)
        missing = received.missing(session.rows)
        session = replace(session, missing=missing, id=received.id)
        Thread(target=self._work, daemon=True, name=f"tracker {self.label}").start()
        self._queue.put(partial(self._begin, session, received))
        self._wait("did not start")
        return self._place

    def _begin(self, session: Session, received: Received) -> None:
        self._tracker.begin(session)
        received.id = self._tracker.id
        if self._tracker.cuts:
            received.replace(session.rows)
        received.write()
        if not self._tracker.cuts:
            for row in session.missing:
                self._log(row, received)
        self._place = self._tracker.describe()

    def log(self, row: Row) -> None:
        """Hand a row over; returns at once. An error of an earlier row is reported now."""
        self._report("failed")
        assert self._received is not None, "begin comes first"
        self._queue.put(partial(self._log, dict(row), self._received))

    def _log(self, row: Row, received: Received) -> None:
        if not received.has(row):
            self._tracker.log(row)
            received.add(row)

    def figures(self, step: int, figures: Mapping[str, Path]) -> None:
        if figures and self._received is not None:
            self._report("failed")
            self._queue.put(partial(self._tracker.figures, step, dict(figures)))

    def sync(self) -> None:
        """Wait until the tracker has every row so far, before a checkpoint counts them."""
        self._wait("failed")

    def finish(self, ending: Ending) -> None:
        if self._received is None:
            return  # the run ended before it began
        self._queue.put(partial(self._tracker.finish, ending))
        self._wait("failed")
        self._queue.put(None)

    def _work(self) -> None:
        while True:
            item = self._queue.get()
            if item is None:
                return
            if isinstance(item, Event):
                item.set()
            elif self._error is None:
                try:
                    item()
                except Exception as error:
                    # Told by the thread that trains, when it next hands something over.
                    self._error = error

    def _wait(self, what: str) -> None:
        """Wait for all that was handed over; what takes too long has failed."""
        if self._error is None:
            is_done = Event()
            self._queue.put(is_done)
            if not is_done.wait(self._section.timeout):
                self._error = TimeoutError(
                    f"no answer within {self._section.timeout:g} s, {self._key}.timeout"
                )
        self._report(what)

    def _report(self, what: str) -> None:
        error = self._error
        if error is None or self._is_reported:
            return
        self._is_reported = True
        reason = shorten_error(error)
        message = f"tracker {self.label} {what} ({reason}); metrics.jsonl has every row"
        if self._section.strict:
            raise LockstepError(f"{message} ({self._key}.strict)")
        self._note(f"{message}, and the run goes on without it")
