"""Which runs `train.cuda_graphs` leaves eager, and why."""

from __future__ import annotations

from trainer.core.run import Run
from trainer.process.cuda_graph import recorder_for


def why_eager(run: Run) -> str:
    """Why no micro-batch of the run can be recorded, as part of a sentence; "" if they can be."""
    if run.task.whole_step:
        return "the loss is of a whole step at once (whole_step)"
    if run.forward.mix is not None and not run.forward.mix.is_idle:
        return "train.mix draws the shares of its images on the host"
    if run.precision.scaler is not None:
        return (
            "train.precision=fp16 scales the loss anew as it goes; bf16 needs no scale"
        )
    if run.is_sharded:
        return "train.parallel=fsdp gathers parameters between the layers"
    if run.ranks.count > 1 and run.config.batch_norm.mode == "sync":
        return "batch_norm.mode=sync exchanges statistics within each forward"
    return ""


def sums_after_backward(run: Run) -> bool:
    """Whether the gradients of several processes are summed after the backward, and not within it as DDP does.

    Bitwise mode has an exchange of its own. It follows from the config, the model and the kind of device, not from what
    a process replays: the same on every rank.
    """
    return (
        run.config.train.cuda_graphs
        and run.ranks.count > 1
        and not run.bitwise
        and recorder_for(run.ranks.device) is not None
        and not why_eager(run)
    )


def describe_graphs(run: Run) -> str:
    """A line for the header; "" where `train.cuda_graphs` is not set, or does nothing on this device."""
    if not run.config.train.cuda_graphs or recorder_for(run.ranks.device) is None:
        return ""
    reason = why_eager(run)
    if reason:
        return f"none: {reason}"
    exchange = ""
    if sums_after_backward(run):
        exchange = "gradients are summed over the processes after the backward, replayed or eager; "
    return (
        "micro-batches are recorded after the first steps, and replayed if that gives the bits of eager; "
        f"{exchange}CUDA graphs have not been tried on a GPU with this trainer"
    )
