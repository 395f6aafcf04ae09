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
    if run.ranks.count > 1 and not run.bitwise:
        return (
            "several processes exchange gradients within the backward; with run.reproducibility=bitwise they do it "
            "after it"
        )
    return ""


def describe_graphs(run: Run) -> str:
    """A line for the header; "" where `train.cuda_graphs` is not set, or does nothing on this device."""
    if not run.config.train.cuda_graphs or recorder_for(run.ranks.device) is None:
        return ""
    reason = why_eager(run)
    if reason:
        return f"none: {reason}"
    return (
        "micro-batches are recorded after the first steps, and replayed if that gives the bits of eager; CUDA graphs "
        "have not been tried on a GPU with this trainer"
    )
