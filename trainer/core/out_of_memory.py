"""What to do when the device's memory runs out in training, long after `batch.fuse` was chosen."""

from __future__ import annotations

import torch

from trainer.core.run import Run
from trainer.errors import LockstepError
from trainer.process.device import device_name

OF_MPS = "MPS backend out of memory"  # an ordinary RuntimeError there


def explain_out_of_memory(
    error: RuntimeError, run: Run, fuse: int, step: int
) -> LockstepError | None:
    """An error that says how to go on, if `error` is that memory ran out; None for any other error.

    The step is not tried again here: ranks that wait in a collective for this one cannot be told to. A resume with a
    smaller `fuse` is the same run.
    """
    if not isinstance(error, torch.OutOfMemoryError) and OF_MPS not in str(error):
        return None
    reason = str(error).splitlines()[0]
    name = device_name(run.ranks.device)
    event = f"rank {run.ranks.rank}, {name}, ran out of memory in step {step} or after it ({reason})"
    if fuse > 1:
        return LockstepError(
            f"{event}, with up to {fuse} micro-batches in one forward; fewer are the same run: batch.fuse={fuse // 2} "
            f"run.resume=auto goes on from the last checkpoint"
        )
    return LockstepError(
        f"{event}, with one micro-batch in a forward; in an evaluation, lower batch.eval_size and go on with "
        f"run.resume=auto; in a step, a new run with a smaller batch.micro_size needs less, or train.precision=bf16"
    )
