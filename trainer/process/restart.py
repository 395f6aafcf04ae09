"""Joining again after torchrun has restarted the ranks: `torchrun --max-restarts`.

torchrun keeps one store for all attempts. In it the new ranks would find the addresses of those that have ended.
"""

from __future__ import annotations

import os
from datetime import timedelta

from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from trainer.process.device import chosen_kind

# Set by torchrun: 0, then 1 after the first restart.
ATTEMPT = "TORCHELASTIC_RESTART_COUNT"


def join_after_restart(timeout: timedelta) -> None:
    """Join the process group under keys of this attempt. Does nothing in the first one, where Accelerate joins."""
    attempt = os.environ.get(ATTEMPT, "0")
    if attempt == "0" or distributed.is_initialized() or "RANK" not in os.environ:
        return
    store, rank, count = next(rendezvous("env://", timeout=timeout))
    distributed.init_process_group(
        _backend(),
        store=PrefixStore(f"attempt_{attempt}", store),
        rank=rank,
        world_size=count,
        timeout=timeout,
    )


def _backend() -> str:
    """The one that Accelerate takes."""
    backend: str = distributed.get_default_backend_for_device(chosen_kind())
    return backend
