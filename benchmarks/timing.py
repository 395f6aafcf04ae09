"""Loops timed in turn: a machine's moods fall on all of them alike, and what is reported is their ratio."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from time import perf_counter, process_time

import numpy as np
import numpy.typing as npt
import torch

from trainer import Trainer
from trainer.exact.plan import Step
from trainer.process.memory import keep_freed_memory

LOCKSTEP = "Lockstep"
Clocks = npt.NDArray[np.float64]  # seconds on the wall, and of the process's CPU time
Loop = Iterator[None]  # a training loop that yields after each of its steps
Seconds = dict[str, list[Clocks]]  # of a step, by loop, one for each round


@dataclass(frozen=True)
class Rounds:
    """`count` rounds, in each of which every loop makes `steps` steps, after one that warms up and does not count."""

    count: int
    steps: int

    @property
    def total_steps(self) -> int:
        """What a run needs: its last step comes after the last round, so that a run's end is in none."""
        return (self.count + 1) * self.steps + 1


class InterleavedTrainer(Trainer):
    """A `Trainer` that lets other loops run between rounds of its own `fit`.

    Nothing of `fit` is left out or written anew: the time of a round is the time from one entry into
    `train_step` to another, with all that `fit` does in between.
    """

    def fit_with(self, loops: Mapping[str, Loop], rounds: Rounds) -> Seconds:
        """Run `fit`, `rounds.total_steps` long, and with it every one of `loops`."""
        assert self.plan.total_steps == rounds.total_steps, (
            "the run is as long as its rounds"
        )
        keep_freed_memory(self.ranks.device.type)  # as `train.py` does
        self._loops, self._rounds = loops, rounds
        self._began = self._clock()
        self._seconds: Seconds = {name: [] for name in (*loops, LOCKSTEP)}
        self.fit()
        return {name: times[1:] for name, times in self._seconds.items()}

    def train_step(self, step: Step) -> None:
        done, within = divmod(step.number - 1, self._rounds.steps)
        if within == 0:
            self._between_rounds(done)
        super().train_step(step)

    def _between_rounds(self, done: int) -> None:
        if done:
            self._seconds[LOCKSTEP].append(
                (self._clock() - self._began) / self._rounds.steps
            )
        if done <= self._rounds.count:
            # Each comes before and after its neighbours.
            for name in list(self._loops)[:: -1 if done % 2 else 1]:
                began = self._clock()
                for _ in islice(self._loops[name], self._rounds.steps):
                    pass
                self._seconds[name].append((self._clock() - began) / self._rounds.steps)
        self._began = self._clock()

    def _clock(self) -> Clocks:
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        return np.array([perf_counter(), process_time()])


def quartiles(seconds: Seconds, name: str, base: str) -> Clocks:
    """Quartiles of a loop's time against that of `base`, round by round: `(3, 2)`, for each of the two clocks."""
    quotients: Clocks = np.divide(seconds[name], seconds[base])
    return np.percentile(quotients, [25, 50, 75], axis=0)
