"""What this process does now, told by marks that cost an attribute each; the watchdog reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Phase:
    """A part of the run. `is_bounded`: what happens between two marks may not take longer than `run.timeout`.

    Elsewhere a process may work for as long as it likes, and counts as stuck only while it does nothing.
    """

    name: str
    is_bounded: bool = True


STARTING = Phase("the start", is_bounded=False)
LOADING = Phase("the loader")
AGREEING = Phase("the agreement on samples to leave out")
COMPUTING = Phase("forward and backward")
EXCHANGING = Phase("the exchange of gradients")
UPDATING = Phase("the end of the step", is_bounded=False)  # observers, too
LOGGING = Phase("logging", is_bounded=False)
FIRST_EVALUATION = Phase("the evaluation", is_bounded=False)  # compiles, perhaps
EVALUATING = Phase("the evaluation")
RECALIBRATING = Phase("the recalibration of BatchNorm", is_bounded=False)
SAVING = Phase("the writer of checkpoints", is_bounded=False)
ENDING = Phase("the end", is_bounded=False)


class Activity:
    """What the main thread does. It alone sets the attributes, apart from a heartbeat that waits in its place.

    `marks` counts the marks; `step` is the number of the step begun last, 0 before the first; `is_first_step` while
    that is the first one of this process, or the first since the model changed, which may have to compile;
    `waits_for_ranks` while the host waits for other ranks; `waits_for_thread` is the thread of this process that the
    main one waits for, or None; `samples` describes, when asked, what the loader was asked for last; `directory` is the
    run's, once it is open; `is_main_lost` says, when asked after rank 0 has ended, whether it left the run's directory
    as a killed process does; `error` is what ends the run, `position` where a wait for other ranks failed; `listener`
    is told of every mark while steps are profiled.
    """

    __slots__ = (
        "directory",
        "error",
        "is_first_step",
        "is_main_lost",
        "listener",
        "marks",
        "phase",
        "position",
        "samples",
        "step",
        "waits_for_ranks",
        "waits_for_thread",
    )

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """As at a run's start."""
        self.phase = STARTING
        self.marks = 0
        self.step = 0
        self.is_first_step = True
        self.waits_for_ranks = False
        self.waits_for_thread: int | None = None
        self.directory: Path | None = None
        self.is_main_lost: Callable[[], bool] | None = None
        self.samples: Callable[[], str] | None = None
        self.position: str | None = None
        self.error: BaseException | None = None
        self.listener: Callable[[Phase], None] | None = None

    def mark(self, phase: Phase) -> None:
        """Progress was made, and `phase` begins or goes on."""
        self.phase = phase
        self.marks += 1
        if self.listener is not None:
            self.listener(phase)

    def go_on(self) -> None:
        """Progress was made in the same phase."""
        self.marks += 1

    def leave(self, error: BaseException | None) -> None:
        """The run ends, with `error` if there is one; what is left is to clean up."""
        self.error = error
        self.mark(ENDING)

    @property
    def is_bounded(self) -> bool:
        """True if the next mark is due within `run.timeout`."""
        return self.phase.is_bounded and not self.is_first_step


activity = Activity()  # of this process
