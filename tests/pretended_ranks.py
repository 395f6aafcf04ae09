"""One rank of a process group of any size, whose other ranks are pretended: what is sent is counted, not received."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer.process.ranks import Ranks


@dataclass
class Traffic:
    """Collective operations of one rank: how many, and the bytes of what it hands over, by the operation's name."""

    calls: Counter[str]
    bytes: Counter[str]

    def count(self, name: str, tensors: list[Tensor]) -> None:
        self.calls[name] += 1
        self.bytes[name] += sum(tensor.nbytes for tensor in tensors)


class TrafficLog(TorchDispatchMode):
    """Counts the collective operations within its context, those of DDP as `ddp`."""

    current: TrafficLog | None = None

    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic(Counter(), Counter())

    def __enter__(self) -> Any:
        TrafficLog.current = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        TrafficLog.current = None
        super().__exit__(*error)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = str(function)
        if name.startswith("c10d."):
            # Of two tensors, what is received comes first.
            handed_over = args[1] if name.startswith("c10d.alltoall_base") else args[0]
            tensors = [x for x in tree_leaves(handed_over) if isinstance(x, Tensor)]
            operation = name.removeprefix("c10d.").partition(".")[0].rstrip("_")
            self.traffic.count(operation, tensors)
        return function(*args, **(kwargs or {}))


@contextmanager
def one_of(count: int, rank: int = 0) -> Iterator[None]:
    """Within it, this process is `rank` of `count`. An operation returns at once, with what this rank handed over."""
    new_group = distributed.new_group
    prepare = Ranks.prepare

    def prepare_counted(ranks: Ranks, model: nn.Module, **options: Any) -> nn.Module:
        prepared = prepare(ranks, model, **options)
        if isinstance(prepared, DistributedDataParallel):
            # The pretended group's operations have no result that the reducer could take.
            prepared.register_comm_hook(count, _count_bucket)
        return prepared

    environment = {
        "RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(count),
    }
    replacements = (
        patch.dict(os.environ, environment),
        patch.object(
            distributed, "new_group", lambda **_: partial(new_group, backend="fake")()
        ),
        patch.object(Ranks, "prepare", prepare_counted),
    )
    with replacements[0], replacements[1], replacements[2]:
        distributed.init_process_group(
            "fake", rank=rank, world_size=count, store=FakeStore()
        )
        try:
            yield
        finally:
            distributed.destroy_process_group()


# DDP compares annotations with its own classes, and here they would be strings.
def _count_bucket(count, bucket):  # type: ignore[no-untyped-def]
    if TrafficLog.current is not None:
        TrafficLog.current.traffic.count("ddp", [bucket.buffer()])
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer() / count)
    return future
