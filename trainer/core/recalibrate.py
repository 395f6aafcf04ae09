"""Exact BatchNorm statistics from the first steps of the present epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from trainer.core.build import Run
from trainer.data.loading import step_requests
from trainer.exact.plan import Step
from trainer.exact.recalibration import recalibrate


def recalibrate_statistics(run: Run, steps_done: int) -> bool:
    """Set the statistics of `run.module` from the first `batch_norm.recalibrate` steps of the epoch after `steps_done`.

    The running statistics must be the true ones before. Returns False where the config asks for none. A collective.
    """
    count = min(run.config.batch_norm.recalibrate, run.plan.steps_per_epoch)
    if not count:
        return False
    epoch = max(0, steps_done - 1) // run.plan.steps_per_epoch
    first = epoch * run.plan.steps_per_epoch
    steps = [run.plan.step(first + index) for index in range(count)]
    micro_batches = sum(len(step.micro_batches) for step in steps)
    recalibrate(run.module, _forwards(run, steps), micro_batches, run.ranks)
    return True


def _forwards(run: Run, steps: list[Step]) -> Iterator[tuple[int, Callable[[], object]]]:
    """This rank's forwards, each with its index among all micro-batches of all ranks."""
    requests = [(step, request) for step in steps for request in step_requests(run.plan, step, run.ranks.rank)]
    micro_batches_before: dict[int, int] = {}
    total = 0
    for step in steps:
        micro_batches_before[step.number] = total
        total += len(step.micro_batches)
    batches = run.train_loader.run([request for _, request in requests])
    for (step, _), batch in zip(requests, batches, strict=True):
        yield micro_batches_before[step.number] + batch.first, partial(run.forward, run.module, batch, step)
