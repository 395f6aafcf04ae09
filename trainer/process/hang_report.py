"""What is said of a run that hangs: of each rank its step, what it does, where its Python stands, and its stacks."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from trainer.process.activity import LOADING, activity
from trainer.process.flight_recorder import write_flight_record
from trainer.process.loader_worker import (
    describe_loader_processes,
    stacks_of_loader_processes,
)
from trainer.process.rank_states import RankState, RankStates, listing, name_state
from trainer.process.stacks import main_thread_position, write_stacks

REMEDY = (
    "if it only works slowly, raise run.timeout; run.resume=auto goes on from the newest "
    "checkpoint"
)
STORE_IS_SILENT = (
    "the other ranks cannot be asked: the process that holds the ranks' store hangs or has ended (rank 0's, or its "
    "launcher's)"
)


class HangReport:
    """Describes this process, which is `rank` of `count`, and the others.

    They have `seconds_to_answer` to say where they stand.
    """

    def __init__(self, rank: int, count: int, seconds_to_answer: float) -> None:
        self.rank = rank
        self.count = count
        self._seconds_to_answer = seconds_to_answer
        self._machine = socket.gethostname()

    def state(self, stacks: str = "", details: str = "") -> RankState:
        """What this rank does."""
        doing = f"in {activity.phase.name}"
        if activity.waits_for_ranks:
            doing += ", waiting for the other ranks"
        return RankState(
            machine=self._machine,
            step=activity.step,
            doing=doing,
            position=activity.position or main_thread_position(),
            clock=time.time(),
            details=details,
            stacks=stacks,
            process=os.getpid(),
        )

    def detailed_state(self) -> RankState:
        """The same with the samples that the loader fetches, and where its processes stand."""
        return self.state(details=_details(stacks_of_loader_processes()))

    def last_state(self) -> RankState:
        """The same with the stacks of this process in a file."""
        workers = stacks_of_loader_processes()
        files = [
            write_stacks(activity.directory, f"stacks_rank{self.rank}.txt", workers),
            write_flight_record(activity.directory, f"nccl_rank{self.rank}.pickle"),
        ]
        names = " and ".join(str(file) for file in files if file is not None)
        return self.state(names, _details(workers))

    def make(self, headline: Callable[[Sequence[int]], str]) -> str:
        """The message for a run that hangs: a headline, given the ranks that are silent, and what each rank does.

        The other ranks write their stacks when they hear of it, and end soon after.
        """
        own = self.last_state()
        # The main thread may ask, while the watchdog's has a connection of its own.
        states = RankStates(self.rank, self.count)
        silent: list[int] = []
        try:
            of_ranks, silent = states.collect(own, self._seconds_to_answer)
            lines = listing(of_ranks)
        except ConnectionError:
            lines = self._alone(own)
        message = "\n  ".join([f"{headline(silent)}:", *lines, REMEDY])
        with suppress(ConnectionError):
            states.set_report(message)
        return message

    def in_one_line(self) -> str:
        """What each rank does, as far as it is known without asking."""
        own = self.detailed_state()
        try:
            states = RankStates(self.rank, self.count)
            return "; ".join(listing(states.last_published(own)))
        except ConnectionError:
            return "; ".join(self._alone(own))

    def _alone(self, own: RankState) -> list[str]:
        """The lines of a rank that can ask no other."""
        lines = [name_state([self.rank], own)]
        return lines if self.count == 1 else [*lines, STORE_IS_SILENT]


def describe_samples() -> str:
    """The samples that the loader was asked for last, if the process waits for them."""
    if activity.phase is not LOADING or activity.samples is None:
        return ""
    try:
        return activity.samples()
    except Exception:
        return ""  # the names come from a data set's own attributes


def _details(workers: Mapping[int, str]) -> str:
    details = [describe_samples(), *describe_loader_processes(workers)]
    return "; ".join(detail for detail in details if detail)
