"""Exact BatchNorm statistics from the first steps of the present epoch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from trainer.core.run import Run
from trainer.data.batches import Request
from trainer.data.left_out import remaining_steps
from trainer.data.requests import step_requests
from trainer.exact.model_and_loss import ModelAndLoss
from trainer.exact.modes import preserved_modes
from trainer.exact.plan import Step
from trainer.exact.recalibration import Forwards, recalibrate
from trainer.process.activity import RECALIBRATING, activity


def recalibrate_statistics(run: Run, steps_done: int) -> bool:
    """Set the statistics of `run.module` from the first `batch_norm.recalibrate` steps of the epoch after `steps_done`.

    The running statistics must be the true ones before. Returns False where the config asks for none. A collective.
    """
    plan = run.plan
    count = min(run.config.batch_norm.recalibrate, plan.steps_per_epoch)
    if not count:
        return False
    # Of the epoch that the last step was in.
    epoch = max(0, steps_done - 1) // plan.steps_per_epoch
    first = epoch * plan.steps_per_epoch
    steps = [plan.step(first + index) for index in range(count)]
    if run.quarantine is not None:
        steps = remaining_steps(
            run.train_loader, plan, steps, run.ranks.rank, run.quarantine
        )
        if not steps:
            return False
    micro_batches = sum(len(step.micro_batches) for step in steps)
    with preserved_modes(run.module):
        # A caller outside `fit` may have left it in eval mode, where no layer sees its own statistics. In training,
        # a layer that is in eval mode is meant to be.
        if not run.module.training:
            run.module.train()
        whole = ModelAndLoss(run.module, run.task)
        recalibrate(whole, _forwards(run, steps), micro_batches, run.ranks)
    return True


def _forwards(run: Run, steps: list[Step]) -> Forwards:
    """This rank's forwards, each with its index among all micro-batches of all ranks."""
    requests: list[Request] = []
    steps_of_requests: list[Step] = []
    firsts: list[int] = []  # of each request's step, the index of its first micro-batch
    micro_batches = 0
    for step in steps:
        for request in step_requests(run.plan, step, run.ranks.rank):
            requests.append(request)
            steps_of_requests.append(step)
            firsts.append(micro_batches)
        micro_batches += len(step.micro_batches)
    batches = run.train_loader.run(requests)
    forward: Callable[[], object] | None = None
    for batch, step, first in zip(batches, steps_of_requests, firsts, strict=True):
        activity.mark(RECALIBRATING)
        forward = partial(run.forward, run.module, batch, step)
        yield first + batch.first, forward
    if run.is_sharded:
        for _ in range(_missing_forwards(run, steps)):
            forward = forward or _first_forward(run, steps[0])
            yield None, forward


def _missing_forwards(run: Run, steps: list[Step]) -> int:
    """How many fewer forwards this rank has than the busiest one. Each forward is one of all ranks."""
    counts = [0] * run.ranks.count
    for step in steps:
        for rank, (first, end) in enumerate(step.ranks):
            counts[rank] += end - first
    return max(counts) - counts[run.ranks.rank]


def _first_forward(run: Run, step: Step) -> Callable[[], object]:
    """The step's first one, for a rank that has none."""
    batch = run.train_loader.peek(
        run.plan.sample_ids(step, 0),
        epoch=step.epoch,
        occurrences=run.plan.occurrences(step, 0),
    )
    return partial(run.forward, run.module, batch, step)
