"""A loader process ends with the process that it loads for, however that one was started and ends."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from multiprocessing.connection import Connection

import psutil
import pytest

from trainer.process.loader_worker import begin_loader_process

SECONDS_TO_END = 60

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere PyTorch's processes look for their rank"
)


def load(told: Connection) -> None:
    begin_loader_process()
    told.send(os.getpid())
    time.sleep(1000)


def be_a_rank(method: str, told: Connection) -> None:
    """Start two loader processes, and end without a word to them."""
    context = multiprocessing.get_context(method)
    for _ in range(2):
        receiver, sender = context.Pipe(duplex=False)
        # Daemonic as PyTorch's, so that they may not start processes of their own.
        context.Process(target=load, args=(sender,), daemon=True).start()
        told.send(receiver.recv())
    os._exit(0)


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_it_ends_with_its_rank(method: str) -> None:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    rank = context.Process(target=be_a_rank, args=(method, sender))
    rank.start()
    loaders = [psutil.Process(receiver.recv()) for _ in range(2)]
    rank.join()
    deadline = time.monotonic() + SECONDS_TO_END
    while any(is_alive(loader) for loader in loaders) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [loader for loader in loaders if is_alive(loader)]
    for loader in left:
        loader.kill()
    assert not left


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
