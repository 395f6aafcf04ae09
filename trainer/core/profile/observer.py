"""The observer behind `train.profile`, and what it leaves in the run's directory."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

from torch.profiler import profile

from trainer.core.observers import Observer
from trainer.core.profile.phases import PhaseRanges, WaitClock
from trainer.core.profile.report import StepProfile, advice, combine, table
from trainer.core.profile.trace import measure, spans_of
from trainer.core.profile.windows import Windows
from trainer.core.run import Run
from trainer.exact.plan import Step
from trainer.process.activity import activity
from trainer.process.device import device_module
from trainer.storage.files import new_file, write_text

FOLDER = "profile"
TRACE = "trace.json.gz"
REPORT = "profile.txt"
# Read once, when the profiler first starts: it reports on itself to stderr.
QUIET = ("KINETO_LOG_LEVEL", "99")


class ProfileObserver(Observer):
    """Times and traces the steps of `windows`, on every rank alike, then reports; the main process writes files.

    It changes nothing that is computed. The host waits for the device where a window begins and ends.
    """

    may_stop = False

    def __init__(
        self, windows: Windows, directory: Path, note: Callable[[str], None]
    ) -> None:
        self.profiles: list[StepProfile] = []  # of all ranks, once they are known
        self._windows = windows
        self._directory = directory / FOLDER
        self._note = note
        self._profiler: profile | None = None
        self._wait_clock: WaitClock | None = None
        self._ranges: PhaseRanges | None = None
        self._start = 0.0
        self._core_start = 0.0
        self.seconds = 0.0  # of a step, without the profiler
        self._loading = 0.0
        self._on_core = 0.0

    def begin(self, run: Run) -> None:
        self._run = run

    @property
    def last_step(self) -> int:
        """The step after which the profile is complete."""
        return self._windows.traced[1]

    def step(self, step: Step) -> None:
        timed, traced = self._windows
        if step.number == timed[0] - 1:
            self._begin_timing()
        if step.number == timed[1]:
            self._end_timing()
        if step.number == traced[0] - 2:
            self._start_profiler()
        if step.number == traced[0] - 1:
            self._begin_trace()
        if step.number == traced[1]:
            self._end_trace(step)

    def close(self) -> None:
        """Stop what still runs, where the run ends within a window."""
        activity.listener = None
        if self._ranges is not None:
            self._ranges.close()
            self._ranges = None
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def end_session(self) -> None:
        """The run ends: stop what still runs, and say so where the profile is not complete."""
        self.close()
        if not self.profiles:
            self._note(
                f"no profile: the run ended before step {self.last_step} was done ({self._windows.describe()})"
            )

    def _synchronize(self) -> None:
        if self._run.ranks.device.type != "cpu":
            device_module(self._run.ranks.device).synchronize()

    def _begin_timing(self) -> None:
        self._synchronize()
        self._wait_clock = WaitClock()
        activity.listener = self._wait_clock
        self._start = perf_counter()
        self._core_start = thread_time()

    def _end_timing(self) -> None:
        self._synchronize()
        assert self._wait_clock is not None
        first, last = self._windows.timed
        count = last - first + 1
        self.seconds = (perf_counter() - self._start) / count
        self._loading = self._wait_clock.seconds / count
        self._on_core = (thread_time() - self._core_start) / count
        activity.listener = None

    def _start_profiler(self) -> None:
        os.environ.setdefault(*QUIET)
        self._profiler = profile()
        self._profiler.start()

    def _begin_trace(self) -> None:
        self._synchronize()
        self._ranges = PhaseRanges()
        activity.listener = self._ranges

    def _end_trace(self, step: Step) -> None:
        self._synchronize()
        profiler = self._profiler
        assert profiler is not None
        self.close()
        first, last = self._windows.traced
        events: Any = profiler.events()  # type: ignore[no-untyped-call]
        traced = measure(spans_of(events), last - first + 1)
        own = combine(self.seconds, self._loading, self._on_core, traced)
        run = self._run
        self.profiles = run.ranks.gather([own])
        lines = self._report(step)
        run.ranks.on_main(partial(self._write, profiler, lines))
        for line in lines:
            self._note(line)

    def _report(self, step: Step) -> list[str]:
        run = self._run
        remedies = advice(self.profiles, run.config, run.ranks.device.type)
        return [
            f"profile: {self._windows.describe()}",
            *table(self.profiles, step.size),
            *(f"advice: {line}" for line in remedies),
            f"trace: {self._directory / TRACE} (for https://ui.perfetto.dev or chrome://tracing)",
        ]

    def _write(self, profiler: profile, lines: list[str]) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        with new_file(self._directory / TRACE) as partial_file:
            profiler.export_chrome_trace(str(partial_file))
        write_text(self._directory / REPORT, "\n".join(lines) + "\n")
