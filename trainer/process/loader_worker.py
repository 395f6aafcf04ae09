"""What a loader process owes its rank: to leave signals to it, to end with it, and to say where it stands."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread

from trainer.process.command import STOP_SIGNALS
from trainer.process.parent import end_with_parent
from trainer.process.stacks import STACK_LINE, is_library, short_path

# Sent by the rank to a loader process, which then writes its stack.
ASK_FOR_STACK = signal.SIGUSR2
STACKS = "lockstep-stacks"  # the name of the memory that a loader process writes its stack to
SECONDS_TO_ANSWER = 0.5
LOADER_FUNCTION = "_worker_loop"  # of PyTorch's loader processes


@contextmanager
def starting_loader_processes() -> Iterator[None]:
    """A context in which loader processes are started: they hear no stop signal before `begin_loader_process`.

    Until then they belong to their rank's group, and torchrun sends its SIGTERM to the whole of that. The rank hears of
    one by a thread that does not start any, or when this ends.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_loader_process() -> None:
    """To be called first thing in a loader process."""
    # A signal to the whole group is for the rank, which must outlive its loaders.
    os.setpgrp()
    # Not the rank's own handlers, which a fork inherits.
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _drop_stop_signals()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    _end_with_rank()
    if hasattr(os, "memfd_create"):
        faulthandler.register(
            ASK_FOR_STACK, file=os.memfd_create(STACKS), all_threads=False
        )


def _drop_stop_signals() -> None:
    """Forget those that have come since this process was started: to ignore a signal for a moment drops it."""
    for number in signal.sigpending().intersection(STOP_SIGNALS):
        handler = signal.signal(number, signal.SIG_IGN)
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _end_with_rank() -> None:
    """Let the kernel kill this process when the rank ends, whatever it waits in. On Linux only.

    Elsewhere it ends by itself when it next asks for work: PyTorch's loader processes look for their parent.
    """
    if sys.platform != "linux":
        return
    end_with_parent(signal.SIGKILL)
    rank = multiprocessing.parent_process()
    if rank is None:
        return
    if not rank.is_alive():
        os._exit(1)  # it ended before the call
    if rank.pid != os.getppid():
        # The server that forked it (`forkserver`) is its parent to the kernel, and lives as long as this process does.
        Thread(target=_end_after, args=(rank,), daemon=True, name="rank").start()


def _end_after(rank: BaseProcess) -> None:
    rank.join()
    os._exit(1)


def loader_processes() -> list[int]:
    """The process ids of this process's loader processes."""
    return [
        process.pid
        for process in multiprocessing.active_children()
        if process.pid is not None and _stack_memory(process.pid) is not None
    ]


def stacks_of_loader_processes() -> dict[int, str]:
    """Where the Python of each loader process stands: the innermost line first, by process id. On Linux only."""
    processes = loader_processes()
    for process in processes:
        with suppress(OSError):
            os.kill(process, ASK_FOR_STACK)
    if processes:
        time.sleep(SECONDS_TO_ANSWER)
    return {process: _read_stack(process) for process in processes}


def _read_stack(process: int) -> str:
    memory = _stack_memory(process)
    if memory is None:
        return ""
    with suppress(OSError):
        return memory.read_text(errors="replace")
    return ""


def _stack_memory(process: int) -> Path | None:
    """Where the memory is read that a loader process writes its stack to; None if there is none."""
    for descriptor in _descriptors(process):
        with suppress(OSError):
            if STACKS in str(descriptor.readlink()):
                return descriptor
    return None


def _descriptors(process: int) -> Iterator[Path]:
    with suppress(OSError):
        yield from Path(f"/proc/{process}/fd").iterdir()


def describe_loader_processes(stacks: Mapping[int, str]) -> list[str]:
    """For each loader process that fetches a sample, where its code stands."""
    descriptions = []
    for process, stack in stacks.items():
        position = _position_in(stack)
        if position:
            descriptions.append(f"loader process {process} at {position}")
    return descriptions


def _position_in(stack: str) -> str:
    """The innermost line of a stack that is no library's; empty for a loader process that waits for work."""
    innermost = stack.rpartition("most recent call first")[2]
    for match in STACK_LINE.finditer(innermost):
        path, line, function = match.groups()
        if function == LOADER_FUNCTION:
            break  # below are the loader itself and what the rank did when it started the process
        if not is_library(path):
            return f"{short_path(path)}:{line} in {function}"
    return ""
