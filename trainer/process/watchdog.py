"""The watchdog: a thread that ends this process when its main thread makes no more progress, and says where it stands.

The main thread tells what it does by marks (`activity`). The thread looks at them every few seconds. It ends the run

- when the main thread has made no progress for `run.timeout`;
- when a signal has asked for the stop, and the main thread does not come to a step's end;
- when another rank's watchdog has ended the run.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

from trainer.config.secrets import redacted_output
from trainer.process import launcher
from trainer.process.activity import ENDING, SAVING, activity
from trainer.process.exit import claim_report, end_now, report_error
from trainer.process.hang_report import HangReport, describe_samples
from trainer.process.rank_states import SECONDS_BETWEEN_LOOKS, Claim, RankStates
from trainer.process.signs_of_life import SignsOfLife
from trainer.process.stacks import stacks_on_crash
from trainer.process.terminal import is_terminal

MAX_SECONDS_BETWEEN_LOOKS = 5.0  # a tenth of the timeout, where that is shorter
SECONDS_BETWEEN_LOOKS_AT_A_STOP = 0.5  # after a SIGTERM there is little time
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


class Watchdog:
    """Watches the main thread while it is entered as a context. A process has one at a time.

    `timeout` is `run.timeout`. `report` describes the run where it hangs.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        rank, count = launcher.rank(), launcher.world_size()
        self._interval = min(MAX_SECONDS_BETWEEN_LOOKS, timeout / 10)
        self.report = HangReport(rank, count, 2 * self._interval + MARGIN)
        self._states = RankStates(rank, count)
        self._ended = False
        self._is_told = threading.Event()  # of the end: nobody writes any more
        self._wake_up, self._wake_up_end = os.pipe()
        os.set_blocking(self._wake_up_end, False)
        self._poll = select.poll()
        self._poll.register(self._wake_up, select.POLLIN)
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
        if self._stop_signals:
            # An interrupt came where this thread was about to leave `hear`.
            signal.set_wakeup_fd(-1)
        os.write(self._wake_up_end, b"\0")
        self._is_told.set()

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
            self._states.publish(self.report.state())
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
        self._is_told.wait()
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
        if not self._poll.poll(interval * 1000):
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
                samples = describe_samples() if self._stop_signal else ""
                state = self.report.state(details=samples)
                claim = self._states.publish(replace(state, idle=self._seconds_idle))
        if claim is not None:
            self._follow(claim)
        elif activity.error is not None:
            if self._is_stop_overdue() or self._seconds_quiet >= self._limit():
                self._end_with(activity.error)
        elif self._is_stop_overdue():
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
        if not self._stop_signal:
            return False
        if self._seconds_to_stop >= LONG_STOP_GRACE:
            return True
        is_idle = self._seconds_idle >= STOP_GRACE and activity.phase is not SAVING
        return is_idle and not self._others_work()

    def _others_work(self) -> bool:
        """True if this rank may only wait for one that has more to do."""
        if self._states.count == 1:
            return False
        with suppress(ConnectionError):
            states = self._states.last_published(self.report.state())
            del states[self._states.rank]
            idle = [state.idle for state in states if state is not None]
            return min(idle, default=STOP_GRACE) < STOP_GRACE / 2
        return False

    # ---------------------------------------------------------------- ending

    def _end_hanging(self) -> None:
        if not self._claims(STATUS):
            self._answer_and_leave(STATUS)
            return
        headline = f"the run made no progress for {self.timeout:g} s (run.timeout)"
        self._end(f"error: {self.report.make(lambda _: headline)}", STATUS)

    def _end_stopped(self) -> None:
        status = 128 + self._stop_signal
        if not self._claims(status):
            self._leave(status)
            return
        self._end(
            f"stopped by signal {self._stop_signal}, but the step did not end within {self._seconds_to_stop:.0f} s "
            f"({self.report.in_one_line()}); go on from the newest checkpoint with run.resume=auto",
            status,
        )

    def _end_with(self, error: BaseException) -> None:
        """The run has ended with an error, and the main thread does not come to report it."""
        if not self._ended:
            end_now(report_error(error))

    def _claims(self, status: int) -> bool:
        try:
            return self._states.claim(status)
        except ConnectionError:
            return True  # nobody can be asked: each rank knows only itself

    def _follow(self, claim: Claim) -> None:
        """A rank has decided that the run ends: end this one, too."""
        if claim.rank == self._states.rank:
            self._leave(claim.status, SECONDS_TO_END)  # its main thread decided
        elif claim.status == STATUS:
            self._answer_and_leave(claim.status)
        else:
            self._leave(claim.status)

    def _answer_and_leave(self, status: int) -> None:
        """Tell the rank that makes the report where this one stands, and end once it is made."""
        with suppress(ConnectionError):
            self._states.answer(self.report.last_state())
            self._states.wait_for_report(SECONDS_TO_LEAVE)
        self._leave(status)

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

    def _end(self, message: str, status: int) -> None:
        if self._ended:
            return
        if claim_report():
            _say(message)
        if self._states.count > 1:
            # The store may end with this process, and those that ask it then print what they lost.
            time.sleep(MARGIN)
        end_now(status)


_current: list[Watchdog] = []


def current_watchdog() -> Watchdog | None:
    """The watchdog of this process, if it is being watched."""
    return _current[-1] if _current else None


@contextmanager
def watching(timeout: float) -> Iterator[None]:
    """Have the main thread watched while the body runs; it marks its progress in `activity`.

    Stacks are also printed where the process dies of a signal such as SIGSEGV. Does nothing in another thread, nor
    within itself.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or _current:
        yield
        return
    activity.reset()
    watchdog = Watchdog(timeout)
    _current.append(watchdog)
    watchdog.start()
    try:
        with stacks_on_crash():
            yield
    finally:
        watchdog.end()
        _current.clear()
        activity.reset()


def _say(message: str) -> None:
    """Print to stderr, whose reader may have stopped reading."""
    message = redacted_output(message)
    # On a terminal the progress bar stands in the line.
    text = f"\n{message}" if is_terminal(sys.stderr) else message

    def say() -> None:
        print(text, file=sys.stderr, flush=True)

    thread = threading.Thread(target=say, daemon=True, name="message")
    thread.start()
    thread.join(2.0)


def _forget_in_fork() -> None:
    """A forked process is not watched, and its signals are not this one's."""
    if _current:
        signal.set_wakeup_fd(-1)
        _current.clear()


os.register_at_fork(after_in_child=_forget_in_fork)
