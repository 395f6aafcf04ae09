"""The last known state of every rank, shared through the store: who hangs, at which step, in what.

Each rank publishes its own from the watchdog's thread every few seconds. When one finds that the run hangs, it claims
the report; the others write their stacks and publish once more, and those that do not are told by what they
published last.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from trainer.errors import HangError, first_few
from trainer.process.parent import has_ended
from trainer.process.store import StoreClient, value_of

STATE_KEY = "lockstep/state"
ANSWER_KEY = "lockstep/answer"
CLAIM_KEY = "lockstep/hang"  # the claim of the rank that makes the report
REPORT_KEY = "lockstep/timeout"  # the report
ENDED_KEY = "lockstep/ended"  # the ranks whose processes have ended
SECONDS_BETWEEN_LOOKS = 0.2
MAX_NAMED_RANKS = 16  # in a line of a report


@dataclass(frozen=True)
class RankState:
    """What a rank does. `clock` is the machine's time of this description.

    `doing` names the phase, and whether it waits for other ranks; `details` has more about it; `stacks` names the file
    with the stacks; `idle` is for how many seconds the rank has neither made progress nor used the CPU;
    `process` is its process id.
    """

    machine: str
    step: int
    doing: str
    position: str
    clock: float
    details: str = ""
    stacks: str = ""
    idle: float = 0.0
    process: int = 0

    def describe(self) -> str:
        """Step, what it does and where its Python stands, in one line."""
        text = f"step {self.step}" if self.step else "before the first step"
        text += f", {self.doing}"
        if self.details:
            text += f" ({self.details})"
        text += f", at {self.position}"
        if self.stacks:
            text += f"; stacks in {self.stacks}"
        return text


@dataclass(frozen=True)
class Claim:
    """The decision of one rank that the run ends, and the exit status with which it does."""

    rank: int
    status: int


class RankStates:
    """The states of `count` ranks; this process is `rank`. With one process, nothing is shared."""

    def __init__(self, rank: int, count: int) -> None:
        self.rank = rank
        self.count = count
        self._client = StoreClient()

    def publish(self, state: RankState) -> Claim | None:
        """Make the state of this rank known; returns another rank's claim that the run ends.

        Raises `ConnectionError` without an answer from the store.
        """
        if self.count == 1:
            return None
        key = f"{STATE_KEY}/{self.rank}"
        text = json.dumps(asdict(state))
        claim = self._client.ask(partial(_publish, key, text))
        if claim is None:
            return None
        return Claim(**json.loads(claim))

    def answer(self, state: RankState) -> None:
        """Tell the rank that makes the report."""
        key = f"{ANSWER_KEY}/{self.rank}"
        text = json.dumps(asdict(state))
        self._client.ask(lambda store: store.set(key, text))

    def claim(self, status: int) -> bool:
        """True for the one rank that is to make the report. Raises `ConnectionError` without an answer."""
        if self.count == 1:
            return True
        claim = Claim(self.rank, status)
        text = json.dumps(asdict(claim))
        # One operation of the store, so that of several ranks that find a hang at once one is the first.
        first = self._client.ask(lambda store: store.compare_set(CLAIM_KEY, "", text))
        return bool(first == text.encode())

    def collect(
        self, own: RankState, seconds: float
    ) -> tuple[list[RankState | None], list[int]]:
        """The states of all ranks, in rank order, once they have answered or after `seconds`; and who has not."""
        states: list[RankState | None] = [None] * self.count
        states[self.rank] = own
        missing = [rank for rank in range(self.count) if rank != self.rank]
        end = time.monotonic() + seconds
        while missing:
            for rank in missing:
                states[rank] = self._read(f"{ANSWER_KEY}/{rank}")
            missing = [rank for rank in missing if states[rank] is None]
            if time.monotonic() >= end:
                break
            time.sleep(SECONDS_BETWEEN_LOOKS)
        for rank in missing:
            last = self._last_of(rank)
            states[rank] = None if last is None else _as_silent(last)
        return states, missing

    def last_published(self, own: RankState) -> list[RankState | None]:
        """The states that all ranks published last, in rank order."""
        states = [self._last_of(rank) for rank in range(self.count)]
        states[self.rank] = own
        return states

    def _last_of(self, rank: int) -> RankState | None:
        return self._read(f"{STATE_KEY}/{rank}")

    def find_ended(self, machine: str, seconds: float) -> list[int]:
        """The ranks whose processes have ended, as the ranks of their machine see it. This one looks on `machine`."""
        end = time.monotonic() + seconds
        while True:
            for rank in range(self.count):
                state = self._last_of(rank)
                is_here = state is not None and state.machine == machine
                if state is not None and is_here and has_ended(state.process):
                    self._add_ended(rank)
            ended = self._client.ask(partial(value_of, key=ENDED_KEY))
            if ended is not None:
                # Every rank of the machine may have added it, and in every look.
                ranks = set(map(int, ended.decode().split()))
                return sorted(ranks)
            if time.monotonic() >= end:
                return []
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _add_ended(self, rank: int) -> None:
        self._client.ask(lambda store: store.append(ENDED_KEY, f"{rank} "))

    def set_report(self, report: str) -> None:
        """Let the other ranks know that the report is made, and that they may end."""
        if self.count > 1:
            text = json.dumps({"reporter": self.rank, "report": report})
            self._client.ask(lambda store: store.set(REPORT_KEY, text))
            # The store may end with this process, and those that ask for the report then print what they lost.
            time.sleep(3 * SECONDS_BETWEEN_LOOKS)

    def wait_for_report(self, seconds: float) -> HangError | None:
        """The report of the rank that claimed it; None if it does not come in time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            value = self._client.ask(partial(value_of, key=REPORT_KEY))
            if value is not None:
                report = json.loads(value)
                return HangError(report["report"], report["reporter"])
            time.sleep(SECONDS_BETWEEN_LOOKS)
        return None

    def _read(self, key: str) -> RankState | None:
        value = self._client.ask(partial(value_of, key=key))
        if value is None:
            return None
        return RankState(**json.loads(value))


def listing(states: Sequence[RankState | None]) -> list[str]:
    """A line for each rank, or for several of a machine that do the same."""
    groups: dict[str, tuple[RankState | None, list[int]]] = {}
    for rank, state in enumerate(states):
        # What differs between ranks that do the same: the name of the file with the stacks.
        key = name_state([], state).replace(f"rank{rank}.", "rank*.")
        _, ranks = groups.setdefault(key, (state, []))
        ranks.append(rank)
    lines = []
    for state, ranks in groups.values():
        lines.append(name_state(ranks, state))
    return lines


def name_state(ranks: Sequence[int], state: RankState | None) -> str:
    """Ranks, their machine and what they do, in one line."""
    if state is None:
        return f"{name_ranks(ranks)}: never heard of"
    text = state.describe()
    if len(ranks) > 1:
        text = text.replace(f"rank{ranks[0]}.", "rank*.")
    return f"{name_ranks(ranks)} on {state.machine}: {text}"


def name_ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, or `ranks 0, 1, 2`."""
    names = first_few(ranks, MAX_NAMED_RANKS)
    return f"rank {names}" if len(ranks) == 1 else f"ranks {names}"


def _as_silent(state: RankState) -> RankState:
    """The last known state of a rank that does not answer."""
    # No less than 0: clocks of two machines differ.
    ago = max(0.0, time.time() - state.clock)
    return replace(state, doing=f"silent; {ago:.0f} s ago it was {state.doing}")


def _publish(key: str, text: str, store: Any) -> bytes | None:
    store.set(key, text)
    return value_of(store, CLAIM_KEY)
