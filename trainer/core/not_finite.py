"""What to say of a loss or a gradient that is not finite: the step, the samples, and how to look at it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from trainer.core import running_at_fault
from trainer.core.evaluation import EvaluationSet
from trainer.core.run import Run
from trainer.core.samples import name_samples, samples_not_finite
from trainer.errors import LockstepError
from trainer.exact.finite import BadSteps, first_not_finite
from trainer.exact.model_and_loss import ModelAndLoss
from trainer.exact.plan import Step

# Of a step: reading them again is not to take longer than the step itself took.
SAMPLES_TO_READ = 1024


def first_bad_step(bad: BadSteps, run: Run) -> tuple[int, str] | None:
    """The first step on any rank that was not finite, and what of it: `loss` or `gradient`. A collective."""
    found = []
    for first, steps in (("loss", bad.loss), ("gradient", bad.gradient)):
        if steps:
            found.append((steps[0], first))
    # Of one step the loss comes first: a gradient follows from it.
    everywhere = sorted(
        run.ranks.gather(found), key=lambda item: (item[0], item[1] != "loss")
    )
    return everywhere[0] if everywhere else None


def describe_step(
    run: Run, step: Step, what: str, *, saved_step: int | None, directory: Path | None
) -> LockstepError:
    """The error for a run whose `what`, loss or gradient, is not finite since `step`. A collective."""
    start = (
        f"the {what} is not finite from step {step.number} (epoch {step.epoch + 1}) on"
    )
    if what == "gradient":
        start += ", while the loss is"
    samples = run.ranks.on_main(lambda: _describe_samples(run, run.remaining(step)))
    kept = "no checkpoint was written before it"
    if saved_step:
        kept = f"the newest checkpoint, of step {saved_step}, is from before it"
    advice = "lower optimizer.lr, set train.max_grad_norm, or raise train.precision"
    message = f"{start}; {samples}; {kept}; {advice}"
    if directory is not None:
        message += (
            f". To see that step taken apart, on one process:\n\n"
            f"    python -m trainer replay {directory} --step {step.number}\n"
        )
    return LockstepError(message)


def _describe_samples(run: Run, step: Step) -> str:
    """The samples of `step` whose inputs or targets are not finite; else its first ones."""
    bad = []
    for index, (_, end) in enumerate(step.micro_batches):
        if end > SAMPLES_TO_READ:
            break
        ids = run.plan.sample_ids(step, index)
        occurrences = run.plan.occurrences(step, index)
        batch = run.train_loader.fetch(
            ids, index, epoch=step.epoch, occurrences=occurrences
        )
        bad += samples_not_finite(run.train_loader, batch, ids, step.epoch)
    if bad:
        return f"of its samples, not finite already in the data: {name_samples(run.data.train, bad)}"
    ids = run.plan.sample_ids(step, 0, len(step.micro_batches))
    return f"its samples: {name_samples(run.data.train, ids.tolist())}"


def validation_not_finite(
    item: EvaluationSet, loss: float, saved_step: int | None, whole: ModelAndLoss
) -> LockstepError:
    """The error for a validation loss that is not finite. A collective."""
    kept = f"the checkpoint of step {saved_step} is kept"
    if not saved_step:
        kept = "no checkpoint was written yet"
    name = "validation" if item.phase == "val" else item.phase
    bad, by_statistics = item.evaluator.samples_not_finite()
    if by_statistics:
        reason = running_at_fault.describe(whole)
        return LockstepError(
            f"the {name} loss is {loss}: {reason}; the weights are finite, and {kept}"
        )
    samples = "no batch by itself has such a loss, so their sum is too large"
    if bad:
        samples = f"it is of {name} samples {name_samples(item.dataset, bad)}"
    return LockstepError(
        f"the {name} loss is {loss}: {samples}; the weights are finite, and {kept}. "
        f"Correct the data, or the loss where it is not defined"
    )


def refuse_not_finite(
    whole: ModelAndLoss,
    optimizer_state: dict[str, Tensor],
    step: int,
    known: Sequence[Tensor] = (),
) -> None:
    """Raise `LockstepError` if weights, norm layers' statistics or the optimizer's state are not finite. Waits.

    Other buffers may hold infinities, as an attention mask does. Tensors, or views, that are `known` to be finite are
    not looked at.
    """
    tensors = dict(whole.named_parameters()) | optimizer_state
    for name, layer in whole.named_norm_layers():
        for key, buffer in layer.named_buffers(recurse=False):
            tensors[f"{name}.{key}"] = buffer
    if known:
        addresses = set(map(_address, known))
        tensors = {n: t for n, t in tensors.items() if _address(t) not in addresses}
    found = first_not_finite(tensors)
    if found is not None:
        raise LockstepError(
            f"{found} is not finite after step {step}, although the step's loss and gradient were; nothing of it is "
            f"kept. Lower optimizer.lr, or raise train.precision"
        )


def _address(tensor: Tensor) -> tuple[object, ...]:
    """Equal for two tensors that are the same values in the same memory."""
    if tensor.layout != torch.strided:
        return (id(tensor),)
    start = tensor.data_ptr()
    return tensor.device, start, tensor.dtype, tensor.shape, tensor.stride()


def skipped_in_a_row(count: int, step: int, by: str) -> LockstepError:
    """The error where one step after the other is left out `by` fp16 or by the config."""
    reason = "the loss or the gradient is not finite in any of them; lower optimizer.lr, or raise train.precision"
    if by == "fp16":
        reason = (
            "the gradient is not finite however little the loss is scaled; use train.precision=bf16 or fp32, or "
            "lower optimizer.lr"
        )
    return LockstepError(
        f"{by} left out {count} steps in a row, up to step {step}: {reason}"
    )


def all_skipped(steps: int) -> LockstepError:
    """The error for a run of `steps` steps none of which changed the weights."""
    return LockstepError(
        f"all {steps} steps were left out, as none was finite, so nothing was trained; use train.precision=bf16 or "
        f"fp32, lower optimizer.lr, or train longer"
    )
