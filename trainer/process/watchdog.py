"""The watchdog: a thread that ends this process when its main thread gets on no more, and says where it stands.

The main thread tells what it does by marks (`activity`). The thread looks at them every few seconds. It ends the run

- when the main thread has made no progress for `run.timeout`;
- when a signal has asked for the stop, and the main thread does not come to a step's end;
- when another rank's watchdog has ended the run.
"""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from trainer.process import launcher
from trainer.process.activity import ENDING, LOADING, SAVING, activity
from trainer.process.exit import claim_report, end_now
from trainer.process.flight_recorder import write_flight_record
from trainer.process.loader_worker import (
    describe_loader_processes,
    stacks_of_loader_processes,
)
from trainer.process.rank_states import (
    SECONDS_BETWEEN_LOOKS,
    Claim,
    RankState,
    RankStates,
    listing,
    name_state,
)
from trainer.process.signs_of_life import SignsOfLife
from trainer.process.stacks import main_thread_position, write_stacks

MAX_SECONDS_BETWEEN_LOOKS = 5.0
SECONDS_BETWEEN_LOOKS_AT_A_STOP = 0.5
# After a SIGTERM, in which nothing is done. Slurm, Kubernetes and torchrun kill after 30 s, unless told otherwise.
STOP_GRACE = 20.0
# A long step, or a checkpoint that is being written, is worth more patience.
LONG_STOP_GRACE = 120.0
# Where others wait in a collective operation, its own timeout comes first: the run then ends in good order.
MARGIN = 1.0
# A rank whose main thread has heard of the end is on its way out.
SECONDS_TO_LEAVE = 15.0
# PyTorch waits 5 s for each loader process that hangs, and W&B's run is to end, too.
SECONDS_TO_END = 60.0
STATUS = 1  # with which launchers start a run again
STACKS_FOLDER = "hang"


class Watchdog:
    """Watches the main thread while it is entered as a context. A process has one at a time.

    `timeout` is `run.timeout`, `directory` the run's.
    """

    def __init__(self, timeout: float, directory: Path) -> None:
        self.timeout = timeout
        self.directory = directory
        self._interval = min(MAX_SECONDS_BETWEEN_LOOKS, timeout / 10)
        self._states = RankStates(launcher.rank(), launcher.world_size())
        self._machine = socket.gethostname()
        self._ended = False
        self._wake_up, self._wake_up_end = os.pipe()
        os.set_blocking(self._wake_up_end, False)
        self._stop_signals: Sequence[int] = ()
        self._stop_signal = 0
        # Without a mark or, where any time may pass between two, a sign of life.
        self._seconds_quiet = 0.0
        # Since the stop signal: without a mark, and without a sign of life either.
        self._seconds_to_stop = 0.0
        self._seconds_idle = 0.0
        self._thread = threading.Thread(
            target=self._watch, daemon=True, name="watchdog"
        )

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Stop watching. The thread ends soon."""
        self._ended = True
        os.write(self._wake_up_end, b"\0")

    @contextmanager
    def hear(self, signals: Sequence[int]) -> Iterator[None]:
        """While the body runs, hear of these signals, whatever the main thread waits in. For the main thread."""
        self._stop_signals = signals
        before = signal.set_wakeup_fd(self._wake_up_end, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            self._stop_signals = ()

    # ---------------------------------------------------------------- looking

    def _watch(self) -> None:
        life = SignsOfLife()
        last_marks = activity.marks
        last_look = time.monotonic()
        with suppress(ConnectionError):
            self._states.publish(self._state())
        while True:
            self._sleep()
            if self._ended:
                break
            now = time.monotonic()
            # A process that was stopped, or a machine that slept, comes back with a long time between two looks.
            seconds = min(now - last_look, 2 * self._interval)
            last_look = now
            self._count(seconds, is_marked=activity.marks != last_marks, life=life)
            last_marks = activity.marks
            self._act()
        os.close(self._wake_up)
        os.close(self._wake_up_end)

    def _count(self, seconds: float, *, is_marked: bool, life: SignsOfLife) -> None:
        """Add the seconds since the last look to those without progress, or begin anew."""
        # They cost a look into /proc.
        works = (self._stop_signal or not activity.is_bounded) and life.look()
        if is_marked:
            self._seconds_quiet = self._seconds_to_stop = self._seconds_idle = 0.0
            return
        self._seconds_to_stop += seconds
        self._seconds_idle = 0.0 if works else self._seconds_idle + seconds
        is_quiet = activity.is_bounded or not works
        self._seconds_quiet = self._seconds_quiet + seconds if is_quiet else 0.0

    def _sleep(self) -> None:
        """Until the next look; a stop signal ends it, and makes the next ones more frequent."""
        interval = self._interval
        if self._stop_signal:
            interval = min(interval, SECONDS_BETWEEN_LOOKS_AT_A_STOP)
        ready, _, _ = select.select([self._wake_up], [], [], interval)
        if not ready:
            return
        for number in os.read(self._wake_up, 4096):
            if number in self._stop_signals and not self._stop_signal:
                self._stop_signal = number
                self._seconds_to_stop = self._seconds_idle = 0.0

    def _act(self) -> None:
        claim = None
        # One that leaves has heard of what there is, and the store may be gone.
        if not self._is_leaving():
            with suppress(ConnectionError):
                # Where a stop is overdue soon, the rank that says so has what was published last.
                samples = self._describe_samples() if self._stop_signal else ""
                claim = self._states.publish(self._state(details=samples))
        if claim is not None:
            self._follow(claim)
        elif self._stop_signal and self._is_stop_overdue():
            self._end_stopped()
        elif self._seconds_quiet >= self._limit():
            self._end_hanging()

    def _limit(self) -> float:
        if activity.phase is ENDING:
            return max(self.timeout, SECONDS_TO_END)
        if self._states.count == 1:
            return self.timeout
        return self.timeout + max(MARGIN, 2 * self._interval)

    def _is_stop_overdue(self) -> bool:
        is_idle = self._seconds_idle >= STOP_GRACE and activity.phase is not SAVING
        return is_idle or self._seconds_to_stop >= LONG_STOP_GRACE

    def _state(self, stacks: str = "", details: str = "") -> RankState:
        doing = f"in {activity.phase.name}"
        if activity.waits_for_ranks:
            doing += ", waiting for the other ranks"
        return RankState(
            machine=self._machine,
            step=activity.step,
            doing=doing,
            position=activity.position or main_thread_position(),
            seconds=self._seconds_quiet,
            clock=time.time(),
            details=details,
            stacks=stacks,
        )

    # ---------------------------------------------------------------- ending

    def _end_hanging(self) -> None:
        if self._claims(STATUS):
            headline = f"the run made no progress for {self.timeout:g} s (run.timeout)"
            self._end(self.report(lambda _: headline), STATUS)
        self._leave(STATUS)

    def _end_stopped(self) -> None:
        status = 128 + self._stop_signal
        own = self._state(details=self._details(stacks_of_loader_processes()))
        if self._claims(status):
            where = self._alone(own)
            with suppress(ConnectionError):
                where = listing(self._states.last_published(own))
            message = (
                f"stopped by signal {self._stop_signal}, but the step did not end within "
                f"{self._seconds_to_stop:.0f} s ({'; '.join(where)}); go on from the newest checkpoint with "
                f"run.resume=auto"
            )
            self._end(message, status, prefix="")
        self._leave(status)

    def _claims(self, status: int) -> bool:
        try:
            return self._states.claim(status)
        except ConnectionError:
            return True  # nobody can be asked: each rank knows only itself

    def _follow(self, claim: Claim) -> None:
        """The run ends by the decision of a rank: tell that one where this one stands, and end too."""
        if claim.rank == self._states.rank:
            self._leave(claim.status, SECONDS_TO_END)  # its main thread decided
        if claim.status == STATUS:
            with suppress(ConnectionError):
                self._states.answer(self.last_state())
                self._states.wait_for_report(SECONDS_TO_LEAVE)
        self._leave(claim.status)

    def _leave(self, status: int, seconds: float = SECONDS_TO_LEAVE) -> None:
        """End, unless the main thread does so in time. One that hangs is not waited for."""
        start = time.monotonic()
        while not self._ended:
            patience = seconds if self._is_leaving() else MARGIN
            if time.monotonic() - start > patience:
                end_now(status)
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _is_leaving(self) -> bool:
        return activity.phase is ENDING or activity.position is not None

    def _end(self, message: str, status: int, prefix: str = "error: ") -> None:
        if self._ended:
            return
        if claim_report():
            _say(prefix + message)
        if self._states.count > 1:
            # The store may end with this process, and those that ask it then print what they lost.
            time.sleep(MARGIN)
        end_now(status)

    # ---------------------------------------------------------------- the report

    def report(self, headline: Callable[[Sequence[int]], str]) -> str:
        """The message for a run that hangs: a headline, given the ranks that are silent, and what each rank does.

        Writes the stacks of this process. The other ranks write theirs when they hear of it, and end soon after.
        """
        own = self.last_state()
        # The main thread may ask, while the watchdog's has a connection of its own.
        shared = RankStates(self._states.rank, self._states.count)
        silent: list[int] = []
        try:
            states, silent = shared.collect(own, 2 * self._interval + MARGIN)
            lines = listing(states)
        except ConnectionError:
            lines = self._alone(own)
        report = "\n".join(
            [f"{headline(silent)}:", *(f"  {line}" for line in lines), REMEDY]
        )
        with suppress(ConnectionError):
            shared.set_report(report)
        return report

    def _alone(self, own: RankState) -> list[str]:
        """The lines for a rank that can ask no other."""
        rank = self._states.rank
        lines = [name_state([rank], own)]
        if self._states.count > 1:
            lines.append(
                "the other ranks cannot be asked: the process that holds the ranks' store hangs or has ended (rank "
                "0's, or its launcher's)"
            )
        return lines

    def last_state(self) -> RankState:
        """The state of this rank, with the stacks in a file."""
        workers = stacks_of_loader_processes()
        rank = self._states.rank
        folders = self._folders()
        path = write_stacks(folders, f"stacks_rank{rank}.txt", workers)
        files = [path, write_flight_record(folders, f"nccl_rank{rank}.pickle")]
        names = " and ".join(str(file) for file in files if file is not None)
        return self._state(names, self._details(workers))

    def _details(self, workers: Mapping[int, str]) -> str:
        """The samples that are waited for, and where the loader processes stand that fetch them."""
        details = [self._describe_samples(), *describe_loader_processes(workers)]
        return "; ".join(detail for detail in details if detail)

    def _folders(self) -> list[Path]:
        """Where this process may leave its stacks."""
        folder = self.directory / STACKS_FOLDER
        if not self.directory.is_dir():
            return []  # on a machine that does not see it
        with suppress(OSError):
            folder.mkdir(exist_ok=True)
        return [folder]

    def _describe_samples(self) -> str:
        """The samples that the loader was asked for last, if the process waits for them."""
        if activity.phase is not LOADING or activity.samples is None:
            return ""
        try:
            return activity.samples()
        except Exception:
            return ""  # a data set's own code may be asked for names


REMEDY = "  if it only works slowly, raise run.timeout; run.resume=auto goes on from the newest checkpoint"

_current: list[Watchdog] = []


def current_watchdog() -> Watchdog | None:
    """The watchdog of this process, if it is being watched."""
    return _current[-1] if _current else None


@contextmanager
def watching(timeout: float, directory: Path) -> Iterator[None]:
    """Have the main thread watched while the body runs; it marks its progress in `activity`.

    Stacks are also printed where the process dies of a signal such as SIGSEGV. Does nothing in another thread, nor
    within itself.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or _current:
        yield
        return
    activity.reset()
    watchdog = Watchdog(timeout, directory)
    _current.append(watchdog)
    watchdog.start()
    try:
        with _stacks_on_crash():
            yield
    finally:
        watchdog.end()
        _current.clear()
        activity.reset()


@contextmanager
def _stacks_on_crash() -> Iterator[None]:
    if faulthandler.is_enabled():
        yield
        return
    try:
        faulthandler.enable()
    except (AttributeError, OSError, ValueError, RuntimeError):
        yield  # stderr is no file
        return
    try:
        yield
    finally:
        faulthandler.disable()


def _say(message: str) -> None:
    """Print to stderr, whose reader may have stopped reading."""

    def say() -> None:
        print(message, file=sys.stderr, flush=True)

    thread = threading.Thread(target=say, daemon=True, name="message")
    thread.start()
    thread.join(2.0)


def _forget_in_fork() -> None:
    """A forked process is not watched, and its signals are not this one's."""
    if _current:
        signal.set_wakeup_fd(-1)
        _current.clear()


os.register_at_fork(after_in_child=_forget_in_fork)
