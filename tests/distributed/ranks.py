"""Run a function in several real processes, joined by gloo as a launcher would join them."""

from __future__ import annotations

import contextlib
import gc
import io
import multiprocessing
import os
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

import torch

# Every optimizer imports the first and every DDP the second: once, here, and not in each rank again.
import torch._dynamo
import torch.distributed.algorithms.ddp_comm_hooks.default_hooks
from accelerate.state import AcceleratorState

from trainer.process.local_ranks import free_port, rank_variables

# Decodes the images of a folder. It looks through all that is imported, so late it would take a second of each rank.
with contextlib.suppress(ImportError, RuntimeError):  # as the trainer does without
    import torchcodec.decoders  # noqa: F401

# Torch is imported once, here, and not in each process again.
FORK = multiprocessing.get_context("fork")


def on_ranks(
    count: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 240,
    **more: Any,
) -> list[Any]:
    """`function(*args, **more)` on `count` ranks; what each returns, in rank order. One rank is a plain process.

    Raises the first rank's failure with its traceback; a rank that does not end in time is killed.
    """
    port = free_port()
    pipes = [FORK.Pipe(duplex=False) for _ in range(count)]
    processes = [
        FORK.Process(
            target=_child,
            args=(rank, count, port, pipe[1], partial(function, *args, **more)),
        )
        for rank, pipe in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    results = []
    try:
        for rank, (receiver, sender) in enumerate(pipes):
            sender.close()
            if not receiver.poll(timeout):
                raise TimeoutError(
                    f"rank {rank} of {count} did not end within {timeout} s"
                )
            failed, value = receiver.recv()
            if failed:
                raise AssertionError(f"rank {rank} of {count} failed:\n{value}")
            results.append(torch.load(io.BytesIO(value), weights_only=False))
    finally:
        for process in processes:
            process.join(5 if len(results) == count else 0.5)
            if process.is_alive():
                process.kill()
    return results


def _child(
    rank: int, count: int, port: int, pipe: Connection, function: Callable[[], Any]
) -> None:
    # Else a collection visits, and so copies, every page of the parent's objects.
    gc.freeze()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if count > 1:
        os.environ |= rank_variables(rank, count, port)
    torch.set_num_threads(1)
    # A fork believes its parent's fork server to be its own child, which it cannot wait for.
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    server._forkserver_pid = server._forkserver_address = (
        server._forkserver_alive_fd
    ) = None
    # A fork has its parent's, if a test there made a Trainer.
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        buffer = io.BytesIO()
        torch.save(function(), buffer)
        assert int(os.environ.get("WORLD_SIZE", "1")) == count
        if count > 1:
            assert torch.distributed.get_world_size() == count, (
                "the ranks were never joined"
            )
        pipe.send((False, buffer.getvalue()))
    except BaseException:
        pipe.send((True, traceback.format_exc()))
    finally:
        pipe.close()
        os._exit(0)  # neither pytest's nor torch's exit handlers belong to this process
