"""What the launcher says about this process: the variables set by torchrun, Accelerate and `launch/slurm.sh`.

They are read from the environment because an error may have to be reported before the processes have joined.
"""

from __future__ import annotations

import os


def quiet_torch() -> None:
    """Hide the warnings of torch's C++ code, unless the user asked for them. To be called before torch is imported.

    Where a rank is lost, each of the others would print a page on its lost connection beside our one sentence.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def rank() -> int:
    """This process's number among all processes of the run; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's number among the run's processes on this machine; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """The number of processes of the run, on all machines; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """The number of processes of the run on this machine; 1 without a launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
