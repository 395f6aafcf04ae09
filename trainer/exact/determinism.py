"""The settings under which one kind of device and one software stack give the same bits again."""

from __future__ import annotations

import os

import torch

from trainer.errors import LockstepError

SETTINGS = "deterministic algorithms · no TF32 · no autotuning · 1 CPU thread a process"
ASSERTED = "device-side assert triggered"
REFUSED = "does not have a deterministic implementation"


def make_deterministic() -> None:
    """Set what bitwise reproducibility needs, for the whole process.

    Threads share out a CPU kernel's sums, and launchers give one process more of them than each of several:
    so one thread, everywhere. See https://docs.pytorch.org/docs/stable/notes/randomness.html for the rest.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")  # train.compile: no kernel chosen by timing it
    torch.set_num_threads(1)


def refused_operation(error: RuntimeError) -> LockstepError | None:
    """The error in the run's own terms, if the device refused an operation or what it was given."""
    if ASSERTED in str(error):  # told by a later operation than the one that failed, and the device is lost
        return LockstepError(
            "a CUDA kernel refused what it was given, most often a target that is no class of the model; the CPU says "
            "which: the same command with CUDA_VISIBLE_DEVICES= before it"
        )
    if REFUSED not in str(error):
        return None
    operation = str(error).split(REFUSED, maxsplit=1)[0].strip()
    return LockstepError(
        f"{operation} has no deterministic kernel on this device, so run.reproducibility=bitwise cannot hold; "
        f"replace the operation in the model or loss, or use run.reproducibility=standard"
    )
