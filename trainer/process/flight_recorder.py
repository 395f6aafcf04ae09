"""NCCL's flight recorder: the last collective operations of each rank, kept by PyTorch in memory."""

from __future__ import annotations

import os
from pathlib import Path

from trainer.process.stacks import write_in

# The second is the name that PyTorch gave the setting before.
VARIABLES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
ENTRIES = "2000"


def enable_flight_recorder() -> None:
    """Keep the last operations, unless the user has set how many. To be called before the process group is made."""
    if not any(name in os.environ for name in VARIABLES):
        os.environ[VARIABLES[0]] = ENTRIES


def write_flight_record(directory: Path | None, name: str) -> Path | None:
    """Write the record as a pickle; returns the file, None where the ranks do not use NCCL.

    `torchfrtrace` reads the files of all ranks.
    """
    from torch import distributed

    if not distributed.is_initialized() or "nccl" not in distributed.get_backend():
        return None
    from torch._C import _distributed_c10d as c10d

    return write_in(
        directory,
        name,
        # Within the thread that may be left behind: NCCL may hold the lock of its record.
        lambda path: _write(path, c10d._dump_nccl_trace()),  # type: ignore[attr-defined]
    )


def _write(path: Path, record: bytes) -> None:
    path.write_bytes(record)
