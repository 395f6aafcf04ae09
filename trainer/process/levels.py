"""The levels of a collective operation: first the ranks of each machine, then those of the same place on all machines.

Between machines there is one network for all ranks of a machine. What these combine first crosses it once, not once
for each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch import distributed


@dataclass(frozen=True)
class Level:
    """The ranks that combine what each has, in order. Each stands for the `span` consecutive ranks around it.

    `group` is torch's group of them, None for all ranks.
    """

    members: list[int]
    span: int = 1
    group: Any = None


def all_ranks(count: int) -> Level:
    """All ranks at once."""
    return Level(list(range(count)))


def levels_of(machines: Sequence[str], rank: int, timeout: timedelta) -> list[Level]:
    """The levels that `rank` takes part in; `machines` are the host names of all ranks, in rank order. A collective.

    All ranks at once where one machine has them all, or where machines are unequal. Operations wait at most `timeout`.
    """
    count = len(machines)
    size = ranks_per_machine(machines)
    if size in (1, count):
        return [all_ranks(count)]
    ranks = list(range(count))
    of_machines = [ranks[first : first + size] for first in ranks[::size]]
    of_places = [ranks[place::size] for place in range(size)]
    machine, place = divmod(rank, size)
    return [
        Level(of_machines[machine], 1, _group(of_machines, timeout)),
        Level(of_places[place], size, _group(of_places, timeout)),
    ]


def ranks_per_machine(machines: Sequence[str]) -> int:
    """How many ranks each machine has, all in a row; 1 where the numbers are unequal or the ranks are scattered."""
    size = len(machines) // len(set(machines))
    in_a_row: list[str] = []
    for name in dict.fromkeys(machines):
        in_a_row += [name] * size
    return size if in_a_row == list(machines) else 1


def _group(members: list[list[int]], timeout: timedelta) -> Any:
    """This rank's group of those given. Every rank makes all of them."""
    group, _ = distributed.new_subgroups_by_enumeration(members, timeout=timeout)
    return group
