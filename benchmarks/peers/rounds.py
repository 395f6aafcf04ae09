"""The director of the rounds: every peer in processes of its own, one turn each in every round."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.peers.environment import ROOT
from benchmarks.peers.job import END, Task, Workload

PATIENCE = 300.0  # seconds until a peer counts as hung
Array = npt.NDArray[np.float64]


class Failed(Exception):
    """A peer cannot do what it was asked, and why, in a line."""


class Peer:
    """The process of one peer."""

    def __init__(self, python: Path, adapter: str) -> None:
        self._connection, theirs = Pipe()
        descriptor = theirs.fileno()
        program = [
            str(python),
            "-m",
            "benchmarks.peers.worker",
            adapter,
            str(descriptor),
        ]
        # One thread for each rank, as a launcher sets it.
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            program, cwd=ROOT, env=os.environ | environment, pass_fds=[descriptor]
        )
        theirs.close()

    def send(self, as_used: bool, request: Any) -> None:
        """To all ranks of the lean task, or of the one as used."""
        self._connection.send((as_used, request))

    def answer(self) -> Any:
        """The answer to the last request, one of each rank; raises `Failed`."""
        if not self._connection.poll(PATIENCE):
            raise Failed(f"no answer within {PATIENCE:.0f} s")
        try:
            answer = self._connection.recv()
        except EOFError:
            raise Failed("its process ended; see above") from None
        failures = [each for each in answer if isinstance(each, str)]
        if failures and isinstance(answer, list):
            raise Failed(failures[0])
        return answer

    def end(self) -> None:
        """Kill it: it has nothing to save, and its ranks end with the connection to it."""
        self._connection.close()
        self._process.kill()
        self._process.wait()


class Entry(NamedTuple):
    """A peer that runs lean, or as it is used."""

    name: str
    as_used: bool

    @property
    def mode(self) -> str:
        return "as used" if self.as_used else "lean"


@dataclass(frozen=True)
class Outcome:
    """What an entry did.

    `seconds`: `(rounds, 2)`, of a step, on the wall and of all ranks' CPU time. `reads`: of tensors on the host, a
    step. `weights`: all parameters after the last step.
    """

    seconds: Array
    reads: float
    weights: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Rounds:
    """`count` of `workload.steps` steps, after one that warms up and before one whose reads on the host are counted."""

    count: int
    workload: Workload

    @property
    def total_steps(self) -> int:
        """The first step is no part of a round, and a trainer does not get to its run's end."""
        return 2 + (self.count + 2) * self.workload.steps


def run_rounds(
    peers: Mapping[str, Peer], rounds: Rounds, directory: Path
) -> tuple[dict[Entry, Outcome], dict[Entry, str]]:
    """What each peer did, lean and as used, and why the others could not."""
    field = Field(peers)
    entries = [Entry(name, as_used) for as_used in (False, True) for name in peers]
    for entry in entries:
        scratch = str(directory / f"{entry.name}-{entry.mode}")
        task = Task(rounds.workload, entry.as_used, rounds.total_steps, scratch)
        field.start(entry, task)
    steps = rounds.workload.steps
    seconds: dict[Entry, list[Array]] = {entry: [] for entry in entries}
    for number in range(rounds.count + 1):
        # Each comes before and after its neighbours.
        for entry in list(field.running)[:: -1 if number % 2 else 1]:
            spent = field.ask(entry, (steps, False))
            if spent is not None and number > 0:
                of_ranks = np.array(spent)
                wall, cpu = of_ranks[:, 0].max(), of_ranks[:, 1].sum()
                seconds[entry].append(np.array([wall, cpu]) / steps)
    reads = {entry: field.ask(entry, (steps, True)) for entry in list(field.running)}
    weights = {entry: field.ask(entry, END) for entry in list(field.running)}
    outcomes = {
        entry: Outcome(
            np.stack(seconds[entry]), max(reads[entry]) / steps, weights[entry][0]
        )
        for entry in field.running
    }
    return outcomes, field.failures


class Field:
    """The entries that still run, and why the others do not."""

    def __init__(self, peers: Mapping[str, Peer]) -> None:
        self._peers = peers
        self.running: list[Entry] = []
        self.failures: dict[Entry, str] = {}

    def start(self, entry: Entry, task: Task) -> None:
        """Begin to train; the answer comes after the first step."""
        self.running.append(entry)
        self.ask(entry, task)

    def ask(self, entry: Entry, request: Any) -> Any:
        """What its ranks answer; None from an entry that failed, which is left out from now on."""
        peer = self._peers[entry.name]
        try:
            peer.send(entry.as_used, request)
            return peer.answer()
        except (Failed, OSError) as failure:
            self.failures[entry] = str(failure)
            self.running.remove(entry)
            return None
