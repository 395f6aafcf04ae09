"""Before training: do the model, its loss, its metrics and the data fit together?

One forward of a few samples, which leaves no trace. Every rank runs the same samples, so all of them find the same:
what a loss divides by, and the first mistake, which one of them reports.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from trainer.components.task import as_weighted_sum
from trainer.core.build import Run
from trainer.core.forward import count_samples
from trainer.core.fuse_check import without_trace
from trainer.core.metrics import Meter
from trainer.core.misfit import KINDS
from trainer.data.samples import MicroBatch
from trainer.errors import ConfigError
from trainer.exact.determinism import refused_operation
from trainer.exact.structures import map_tensors

FEW = 4  # samples: what does not fit does not fit for four


def check_first_forward(run: Run) -> None:
    """Raise `ConfigError` or `DataError` where the first samples, the model and the task do not fit together.

    Raises `LockstepError` for an operation that the device refuses.
    """
    try:
        _check(run)
    except RuntimeError as error:
        cause = refused_operation(error)
        if cause is None:
            raise
        raise cause from None


def _check(run: Run) -> None:
    ids = run.plan.sample_ids(run.plan.step(0), 0)
    try:
        _run(run, ids[:FEW])
    except Exception:
        if len(ids) <= FEW:
            raise
        # A model or a loss may be made for micro-batches of their own size.
        _run(run, ids)


def _run(run: Run, ids: Any) -> None:
    run.module.train()
    with without_trace(run), _eager(run):
        batch = run.train_loader.peek(ids)
        output, loss = run.forward(run.module, batch, run.plan.step(0))
        if isinstance(loss.weight, int) and _is_uneven(run):
            _check_weight_of_half(run, batch, output, loss.weight)
        meter = Meter(run.task, run.ranks)
        meter.add(batch, output, loss)
        meter.flush()


def _eager(run: Run) -> AbstractContextManager[object]:
    """Compiling for these few samples would take long, and could change what is compiled for the run."""
    is_compiled = run.config.train.compile
    return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()


def _is_uneven(run: Run) -> bool:
    """True if an epoch has micro-batches of more than one size."""
    steps = [run.plan.step(0), run.plan.step(run.plan.steps_per_epoch - 1)]
    return (
        len({stop - start for step in steps for start, stop in step.micro_batches}) > 1
    )


def _check_weight_of_half(
    run: Run, batch: MicroBatch, output: Any, weight: int
) -> None:
    """An int as weight is a count that all samples share: half of the samples weigh half as much."""
    samples = count_samples(batch)
    if samples is None or samples < 2:
        return
    half = samples // 2

    def first_half(tensor: Tensor) -> Tensor:
        has_rows = tensor.dim() > 0 and len(tensor) == samples
        return tensor[:half] if has_rows else tensor

    output = map_tensors(first_half, output)
    targets = map_tensors(first_half, batch.targets)
    try:
        loss = as_weighted_sum(run.task.loss_sum(output, targets))
    except KINDS:
        return  # a loss that cannot take fewer samples than the model did
    if isinstance(loss.weight, int) and loss.weight * samples != weight * half:
        raise ConfigError(
            "loss.name",
            f"loss_sum returned the int {weight} as the weight of {samples} samples, and {loss.weight} for {half} of "
            f"them; an int is a count that is the same for every sample: where it depends on the targets, return a "
            f"0-dim tensor, such as torch.tensor({weight})",
        )
