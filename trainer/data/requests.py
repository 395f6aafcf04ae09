"""What a loader is asked for: the requests of a step, and those of a whole set."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from trainer.data.batches import Request
from trainer.exact.plan import Plan, Step, split_evenly


def step_request(plan: Plan, step: Step, first: int, end: int) -> Request:
    """The request for the micro-batches `[first, end)` of `step`, as one."""
    return Request(
        first,
        step.epoch,
        plan.sample_ids(step, first, end),
        fused=end - first,
        occurrences=plan.occurrences(step, first, end),
    )


def step_requests(plan: Plan, step: Step, rank: int) -> Iterator[Request]:
    """Requests for what `rank` runs of `step`, one micro-batch at a time."""
    for index in range(*step.ranks[rank]):
        yield step_request(plan, step, index, index + 1)


def whole_requests(samples: int, size: int, rank: int, ranks: int) -> Iterator[Request]:
    """Requests for a rank's share of all samples, in order, each exactly once, at most `size` at a time."""
    batches = split_evenly(samples, math.ceil(samples / size))
    first, end = split_evenly(len(batches), ranks)[rank]
    for index in range(first, end):
        yield Request(index, 0, np.arange(*batches[index]))
