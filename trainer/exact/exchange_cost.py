"""What bitwise mode's exchange costs: the law, and the setting that makes it cheapest.

P is what a contribution weighs: the bytes of all trained parameters and running statistics. N ranks run a step of M
micro-batches, and k is the largest number of nodes that a rank's range of the tree leaves. In a step, that rank sends
k (N-1)/N P in one `all_to_all`, and (N-1)/N P when the result is spread; no rank sends or receives more. A ring
all-reduce sends 2 (N-1)/N P, so the exchange sends (k + 1)/2 times as much.

    M/N = 2^j     k = 1     1 × the ring
    M/N = 3·2^j   k = 2     1.5 ×
    any other     at most 2.5 × up to 8 micro-batches a rank, 4.5 × up to 32, and about log2(M/N) × beyond

On several machines the law holds for each of the two levels: within a machine for its ranks, and between the machines
for what each of them has summed. A machine then sends what one rank alone would send.

The gradient's bytes have a number for each parameter among them: by how many it was used.
"""

from __future__ import annotations

import math

from trainer.exact.plan import Plan, split_evenly
from trainer.exact.tree import nodes_of_range


def exchange_cost(micro_batches: int, ranks: int, a_machine: int = 1) -> float:
    """The bytes that the busiest rank sends in a step, in those of a ring all-reduce.

    With `a_machine` ranks on each machine, the busiest rank or machine: each among its like.
    """
    ranges = split_evenly(micro_batches, ranks)
    most = 1
    for span in (1, a_machine):
        for start in range(0, ranks, span):
            first, _ = ranges[start]
            _, end = ranges[start + span - 1]
            most = max(most, len(nodes_of_range(first, end, micro_batches)))
    return (most + 1) / 2


def cheapest_micro_size(plan: Plan, a_machine: int = 1) -> int | None:
    """The `batch.micro_size` nearest to the plan's whose exchange costs what a ring does; a smaller one if there is.

    None if there is no such size.
    """
    samples = plan.step(0).size
    smaller = range(plan.micro_size, 0, -1)
    larger = range(plan.micro_size + 1, samples + 1)
    for sizes in (smaller, larger):
        for size in sizes:
            micro_batches = math.ceil(samples / size)
            if micro_batches < plan.ranks:
                continue
            if exchange_cost(micro_batches, plan.ranks, a_machine) == 1:
                return size
    return None


def describe_exchange(plan: Plan, a_machine: int = 1) -> str:
    """A line for the header of a bitwise run on several ranks; empty where the exchange costs what a ring does."""
    if plan.ranks == 1:
        return ""
    cost = exchange_cost(len(plan.step(0).micro_batches), plan.ranks, a_machine)
    if cost == 1:
        return ""
    line = f"{cost:g} × the bytes of a ring all-reduce"
    size = cheapest_micro_size(plan, a_machine)
    return line if size is None else f"{line}; 1 × with batch.micro_size={size}"
