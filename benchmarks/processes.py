"""Runs on several real processes of one machine, joined by gloo as a launcher would join them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from trainer.process.local_ranks import free_port, rank_variables

# Torch is imported once, in a process without threads.
CLEAN = multiprocessing.get_context("forkserver")
# scikit-learn's, or it leaves semaphores behind.
os.environ.setdefault("JOBLIB_MULTIPROCESSING", "0")
CLEAN.set_forkserver_preload(["benchmarks.preload"])
FORK = multiprocessing.get_context("fork")
PATIENCE = 300.0  # seconds for the processes of a run to end
MAY_FORK = "BENCHMARKS_MAY_FORK"  # the process id of one that has run nothing of torch


def allow_fork() -> None:
    """Fork from this process from now on, which saves importing torch again. It must run nothing of torch before."""
    os.environ[MAY_FORK] = str(os.getpid())


def _context() -> Any:
    import torch

    if os.environ.get(MAY_FORK) != str(os.getpid()):
        return CLEAN
    # CUDA cannot be used in a fork of a process that has used it.
    is_used: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return CLEAN if is_used else FORK


def on_processes(
    count: int, function: Callable[..., Any], *args: Any, device: str = "cpu"
) -> list[Any]:
    """What `function(*args)` returns on each of `count` processes; None of one that a signal ended.

    They run on the CPU, or share the first GPU (`device="cuda"`).

    `function` and what it takes and gives must be picklable. What the processes print is not shown, unless one fails.
    """
    port = free_port()
    context = _context()
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    processes = [
        context.Process(
            target=_as_rank,
            args=((rank, count, port), device, pipe[1], partial(function, *args)),
        )
        for rank, pipe in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    for _, sender in pipes:
        sender.close()
    deadline = time.monotonic() + PATIENCE
    try:
        outcomes = [_received(receiver, deadline) for receiver, _ in pipes]
    finally:
        for process in processes:
            process.join(1)
            process.kill()
    for outcome in outcomes:
        if isinstance(outcome, str):
            raise RuntimeError(f"one of {count} processes failed: {outcome}")
    return [outcome and outcome[0] for outcome in outcomes]


def _received(receiver: Connection, deadline: float) -> Any:
    if not receiver.poll(max(0.0, deadline - time.monotonic())):
        raise TimeoutError(
            f"the processes of a run did not end within {PATIENCE:.0f} s"
        )
    try:
        return pickle.loads(receiver.recv_bytes())
    except EOFError:  # a signal ended it
        return None


def _as_rank(
    group: tuple[int, int, int],
    device: str,
    pipe: Connection,
    function: Callable[[], Any],
) -> None:
    """`group`: which rank, of how many, who meet at which port.

    Ends without the interpreter's own way out, as `trainer.process.exit.exit_process` does.
    """
    import torch

    rank, count, port = group
    if device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    if count > 1:
        local = rank if device == "cpu" else 0  # of one GPU each rank is the first
        os.environ |= rank_variables(rank, count, port) | {"LOCAL_RANK": str(local)}
        if device != "cpu":
            # NCCL refuses two processes on one GPU.
            torch.distributed.init_process_group("gloo")
    # Of loader processes, as in a process started by hand.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    with (
        Path(os.devnull).open("w") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
    ):
        try:
            result: Any = (function(),)
            if count > 1 and torch.distributed.get_world_size() != count:
                result = "the processes were never joined"
        except BaseException as error:
            result = f"{type(error).__name__}: {error}"
    # Tensors go as bytes: their memory would end with this process.
    pipe.send_bytes(pickle.dumps(result))
    pipe.close()
    sys.stdout.flush()
    os._exit(0)
