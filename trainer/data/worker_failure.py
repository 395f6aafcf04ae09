"""What a loader process leaves behind when it ends before its time, and the one message that is made of it."""

from __future__ import annotations

import errno
import multiprocessing.connection
import multiprocessing.queues
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.sharedctypes import RawArray
from typing import Any

from torch.utils.data import get_worker_info

from trainer.errors import LockstepError
from trainer.process.loader_start import explain_early_end
from trainer.process.parent import signal_name

NO_SAMPLE = -1  # ids begin with 0
REASON_LENGTH = 300  # bytes
SECONDS_TO_END = 1.0  # from the error that tells of a process's end to the end itself

# Where an error names what was used up, and what its message then says.
HANDLES = ("too many open files", f"errno {errno.EMFILE}]")
# PyTorch's files there are named "/torch_…".
SHARED_MEMORY = ("shared memory", "bus error", "file </torch_")
FEWER = "set data.workers, data.prefetch or batch.micro_size lower"


class WorkerNotes:
    """Memory that loader processes share with their rank: the process, sample and last error of each."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._processes = RawArray("q", workers)
        self._samples = RawArray("q", [NO_SAMPLE] * workers)
        self._reasons = [RawArray("c", REASON_LENGTH) for _ in range(workers)]

    def begin_in_worker(self, worker: int) -> None:
        """To be called in loader process number `worker`, once its data set is there."""
        self._processes[worker] = os.getpid()
        # Not PyTorch's handlers, which print a line of their own.
        for number in (signal.SIGBUS, signal.SIGSEGV, signal.SIGFPE):
            signal.signal(number, signal.SIG_DFL)
        info: Any = get_worker_info()
        info.dataset.at_sample = lambda sample: self._note_sample(worker, sample)

        def give_up(error: BaseException, _: Any) -> None:
            self._reasons[worker].value = str(error).encode()[: REASON_LENGTH - 1]
            os._exit(1)

        # Else the thread that sends a micro-batch drops it after a traceback, and the rank waits for ever.
        queue: Any = multiprocessing.queues.Queue
        queue._on_queue_feeder_error = staticmethod(give_up)

    def _note_sample(self, worker: int, sample: int) -> None:
        self._samples[worker] = sample

    def failure(
        self, error: Exception, processes: list[Any], name: Callable[[int], str]
    ) -> LockstepError | None:
        """The message for `error`, by which the loader told of a problem; None if no process and no limit is behind it.

        `processes` are the loader processes; `name` gives what a message calls a sample.
        """
        ended = _first_ended(processes)
        worker = None if ended is None else self._worker(ended.pid)
        reason = "" if worker is None else self._reasons[worker].value.decode()
        text = f"{error} {reason}".lower()
        exit_status = 0 if ended is None else int(ended.exitcode)
        sample = NO_SAMPLE if worker is None else self._samples[worker]
        loading = "" if sample == NO_SAMPLE else f" while it loaded {name(sample)}"
        if any(phrase in text for phrase in HANDLES):
            return LockstepError(
                f"the loader processes ran out of file handles{loading}; raise their limit (ulimit -n), or {FEWER}"
            )
        is_out_of_memory = any(phrase in text for phrase in SHARED_MEMORY)
        if is_out_of_memory or exit_status == -signal.SIGBUS:
            return LockstepError(
                f"the loader processes ran out of shared memory (/dev/shm){loading}; {FEWER}, or give it more "
                f"(docker run --shm-size=8g)"
            )
        if ended is None:
            return None
        if worker is None:
            early = explain_early_end(ended.pid, exit_status)
            if early is not None:
                return early
        return LockstepError(
            f"loader process {ended.pid} {_end(exit_status)}{loading}"
            + (f" ({reason})" if reason else "")
            + _advice(exit_status)
        )

    def _worker(self, process: int) -> int | None:
        for worker in range(self._workers):
            if self._processes[worker] == process:
                return worker
        return None


def is_limit(error: Exception) -> bool:
    """True for an error of a loader process that is out of shared memory or file handles."""
    text = str(error).lower()
    return any(phrase in text for phrase in (*SHARED_MEMORY, *HANDLES))


def _first_ended(processes: list[Any]) -> Any:
    """The first process that failed; if all run, the first that fails within a moment, or None."""
    for process in processes:
        if process.exitcode:
            return process
    sentinels = {process.sentinel: process for process in processes}
    for sentinel in multiprocessing.connection.wait(list(sentinels), SECONDS_TO_END):
        process = sentinels[sentinel]
        process.join()
        return process
    return None


def _end(exit_status: int) -> str:
    if exit_status < 0:
        return f"was killed by {signal_name(-exit_status)}"
    return f"ended with status {exit_status}"


def _advice(exit_status: int) -> str:
    if exit_status == -signal.SIGKILL:
        return f"; if nobody did, the machine was out of memory: {FEWER}"
    if exit_status < 0:
        return "; data.workers=0 shows where, with a debugger or python -X faulthandler"
    return "; data.workers=0 loads in the rank itself, which shows why"


@contextmanager
def without_sigchld_handler() -> Iterator[None]:
    """Within, a new PyTorch loader leaves SIGCHLD as it is.

    Its handler raises wherever the main thread happens to be, in the midst of a step or a checkpoint. Without it, the
    loader notices the end of a process where the loop waits for a micro-batch, after at most 5 s.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)
