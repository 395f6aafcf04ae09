"""By which signal a rank of this machine was ended: seen before its parent asks, after which the system forgets it.

A killed rank cannot say so, and the others only lose the connection to it. Linux shows the status of a process to all
of its user's from its end until its parent has asked for it; a launcher asks within a tenth of a second.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from threading import Thread

from trainer.process.parent import fatal_signal, signal_name


class Peers:
    """Watches the other ranks of this machine, given as process ids by rank, from a thread that sleeps until one ends.

    `signals` has the number of the signal that ended a rank, by rank, where it was seen.
    """

    def __init__(self, processes: Mapping[int, int]) -> None:
        self.signals: dict[int, int] = {}
        self._processes = processes
        self._poll = select.poll()
        self._ranks: dict[int, int] = {}  # by file descriptor
        if sys.platform == "linux":
            for rank, process in processes.items():
                # It may have ended, or be in a container of its own.
                with suppress(OSError):
                    self._add(rank, os.pidfd_open(process))
        if self._ranks:
            Thread(target=self._watch, daemon=True, name="peers").start()

    def describe(self, rank: int) -> str:
        """How a rank ended that said nothing itself: `was killed by SIGKILL` where the signal was seen."""
        number = self.signals.get(rank)
        if number is None:
            return "ended without an error of its own: it crashed or was killed"
        return f"was killed by {signal_name(number)}"

    def _add(self, rank: int, descriptor: int) -> None:
        self._ranks[descriptor] = rank
        self._poll.register(descriptor, select.POLLIN)

    def _watch(self) -> None:
        while self._ranks:
            for descriptor, _ in self._poll.poll():
                rank = self._ranks.pop(descriptor)
                number = fatal_signal(self._processes[rank])
                if number is not None:
                    self.signals[rank] = number
                self._poll.unregister(descriptor)
                os.close(descriptor)


@lru_cache(maxsize=1)  # one thread, however many runs the same ranks make
def watch_peers(processes: frozenset[tuple[int, int]]) -> Peers:
    """The watched `(rank, process id)` pairs."""
    return Peers(dict(processes))
