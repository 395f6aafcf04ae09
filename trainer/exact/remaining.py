"""A step without the samples that cannot be read: smaller micro-batches, and nothing in the place of what is left out.

It is a step as any other, so all that is exact about a step is exact about it: the divisor of its loss, the tree of
its sums, the running statistics of as many micro-batches as have samples left.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from trainer.exact.plan import IndexRange, Plan, Step


def remaining_step(plan: Plan, step: Step, bad: Collection[int]) -> Step:
    """`step`, as it is planned, without the sample ids `bad`. A micro-batch of which no sample remains is none.

    Each rank keeps its own micro-batches, so a rank may be left with nothing to do, and a step with no samples.
    """
    if not bad:
        return step
    ids = plan.sample_ids(step, 0, len(step.micro_batches))
    is_bad = np.isin(ids, list(bad))
    if not is_bad.any():
        return step
    # How many samples remain of those before each place in the step.
    remaining_up_to = np.cumsum(~is_bad)
    remaining_before = [0, *remaining_up_to.tolist()]
    micro_batches: list[IndexRange] = []
    ranks: list[IndexRange] = []
    for first, end in step.ranks:
        first_of_rank = len(micro_batches)
        for planned_start, planned_stop in step.micro_batches[first:end]:
            start = remaining_before[planned_start]
            stop = remaining_before[planned_stop]
            if start < stop:
                micro_batches.append((start, stop))
        ranks.append((first_of_rank, len(micro_batches)))
    return step._replace(
        size=remaining_before[-1],
        micro_batches=micro_batches,
        ranks=ranks,
        has_idle_rank=any(first == end for first, end in ranks),
        left_out=tuple(np.flatnonzero(is_bad).tolist()),
    )
