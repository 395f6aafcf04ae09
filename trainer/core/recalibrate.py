"""Exact BatchNorm statistics from the first steps of the present epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from trainer.core.run import Run
from trainer.data.batches import Request
from trainer.data.left_out import remaining_steps
from trainer.data.requests import step_requests
from trainer.exact.model_and_loss import ModelAndLoss
from trainer.exact.modes import preserved_modes
from trainer.exact.plan import Step
from trainer.exact.recalibration import recalibrate
from trainer.process.activity import RECALIBRATING, activity


def recalibrate_statistics(run: Run, steps_done: int) -> bool:
    """Set the statistics of `run.module` from the first `batch_norm.recalibrate` steps of the epoch after `steps_done`.

    The running statistics must be the true ones before. Returns False where the config asks for none. A collective.
    """
    plan = run.plan
    count = min(run.config.batch_norm.recalibrate, plan.steps_per_epoch)
    if not count:
        return False
    first = max(0, steps_done - 1) // plan.steps_per_epoch * plan.steps_per_epoch
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


def _forwards(
    run: Run, steps: list[Step]
) -> Iterator[tuple[int, Callable[[], object]]]:
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
    for batch, step, first in zip(batches, steps_of_requests, firsts, strict=True):
        activity.mark(RECALIBRATING)
        yield first + batch.first, partial(run.forward, run.module, batch, step)
