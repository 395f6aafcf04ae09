"""Train on several processes from a notebook's cell, or from any Python program, without a launcher.

Every process is a fresh interpreter. Accelerate's `notebook_launcher` and `multiprocessing` fork the notebook's
process instead, which fails once it has used a GPU, and may hang once it has used torch's threads.
"""

from __future__ import annotations

import codecs
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep
from typing import Any, TypeVar

from trainer.errors import ConfigError, LockstepError, Stopped
from trainer.process import launcher
from trainer.process.launched import ERROR_FILE, RESULT_FILE, WORK_FILE, Failure
from trainer.process.local_ranks import rank_environments
from trainer.process.parent import signal_name

T = TypeVar("T")

POLL_INTERVAL = 0.1  # seconds
# From SIGTERM to SIGKILL, for processes that outlive a failed one; torchrun's own.
KILL_DELAY = 30.0
START = "import sys; sys.path[:] = {path!r}; from trainer.process.launched import main; main({directory!r})"


def launch(train: Callable[..., T], *arguments: Any, processes: int | None = None) -> T:
    """Run `train(*arguments)` on each of several processes; returns what it returns on rank 0.

    `processes` is by default one for each GPU, or 1 without any. `train` may be a function defined in a cell, and uses
    the cells' other names by copies: what it changes there stays in its own process. What the processes print is shown
    as it comes.

    An interrupt (Ctrl-C, the stop button) stops a run of `Trainer` after its present step, with a checkpoint, and a
    second one at once. Raises `LockstepError` with the message of the rank that failed, `Stopped` after an interrupt.
    """
    if "RANK" in os.environ:
        raise LockstepError(
            f"launch starts processes, and this is already rank {launcher.rank()} of {launcher.world_size()}; call the "
            f"function itself"
        )
    count = _check_processes(processes)
    with tempfile.TemporaryDirectory(prefix="lockstep-") as directory:
        path = Path(directory)
        (path / WORK_FILE).write_bytes(_pickled(train, arguments))
        _Processes(path, count).run()
        result: T = pickle.loads((path / RESULT_FILE).read_bytes())
        return result


def _check_processes(processes: int | None) -> int:
    import torch

    from trainer.process.device import ON_THE_CPU, chosen_kind

    kind = chosen_kind()
    devices = torch.accelerator.device_count() if kind != "cpu" else 0
    count = max(1, devices) if processes is None else processes
    if count < 1:
        raise ConfigError("processes", f"{count} is less than 1")
    if kind != "cpu" and count > devices:
        raise ConfigError(
            "processes",
            f"{count} processes need a device each, and there are {devices} ({kind}); start fewer, or {ON_THE_CPU}",
        )
    return count


def _pickled(train: Callable[..., Any], arguments: tuple[Any, ...]) -> bytes:
    try:
        import cloudpickle
    except ImportError:
        raise LockstepError(
            "launch needs the package cloudpickle; install it: pip install cloudpickle"
        ) from None
    try:
        # Functions of a notebook are in no file that another process could import.
        work: bytes = cloudpickle.dumps((train, arguments))
    except Exception as error:
        raise LockstepError(
            f"launch cannot copy {getattr(train, '__name__', 'the function')} to other processes "
            f"({type(error).__name__}: {error}); make what it uses inside of it"
        ) from None
    return work


class _Processes:
    """The processes of one launch: started, shown, stopped and judged."""

    def __init__(self, directory: Path, count: int) -> None:
        self._directory = directory
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._statuses: dict[int, int] = {}  # in the order in which they ended
        self._interrupts = 0
        self._kill_at: float | None = None
        self._output, write_end = os.pipe()
        # A character may come in two parts.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        start = START.format(path=sys.path, directory=str(directory))
        try:
            for rank, environment in enumerate(_environments(count)):
                self._running[rank] = subprocess.Popen(
                    [sys.executable, "-c", start],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=write_end,
                    stderr=write_end,
                    # An interrupt reaches this process alone, which passes it on once.
                    process_group=0,
                )
        finally:
            os.close(write_end)

    def run(self) -> None:
        """Wait for all. Raises `LockstepError`, or `KeyboardInterrupt` where an interrupt left no message."""
        try:
            while self._running:
                try:
                    self._watch()
                except KeyboardInterrupt:
                    self._interrupt()
            while self._show(0):
                pass  # what came last
        finally:
            for process in self._running.values():
                process.kill()
                process.wait()
            os.close(self._output)
        self._judge()

    def _watch(self) -> None:
        self._show(POLL_INTERVAL)
        for rank, process in list(self._running.items()):
            status = process.poll()
            if status is not None:
                del self._running[rank]
                self._statuses[rank] = status
                if status and self._kill_at is None:
                    self._send(signal.SIGTERM)
                    self._kill_at = monotonic() + KILL_DELAY
        if self._kill_at is not None and monotonic() > self._kill_at:
            self._send(signal.SIGKILL)

    def _show(self, seconds: float) -> bool:
        """Print what the processes print within so many seconds. True if there was something."""
        if not select.select([self._output], [], [], seconds)[0]:
            return False
        output = os.read(self._output, 1 << 16)
        sys.stdout.write(self._decoder.decode(output))
        sys.stdout.flush()
        if not output:
            # All have closed it, and are about to end.
            sleep(seconds)
        return bool(output)

    def _interrupt(self) -> None:
        self._interrupts += 1
        self._send(signal.SIGINT)
        if self._interrupts > 1:
            self._kill_at = monotonic() + KILL_DELAY

    def _send(self, number: int) -> None:
        for process in self._running.values():
            process.send_signal(number)

    def _judge(self) -> None:
        statuses = self._statuses
        failed = [rank for rank, status in statuses.items() if status]
        if not failed:
            return
        failure = self._cause(failed)
        if failure is not None and failure.status == 128 + signal.SIGINT:
            raise Stopped(failure.message, signal.SIGINT)
        if failure is not None:
            error = LockstepError(failure.message)
            error.exit_status = failure.status
            raise error
        if self._interrupts:
            raise KeyboardInterrupt
        rank = failed[0]
        raise LockstepError(
            f"rank {rank} of {len(statuses)} {_describe_status(statuses[rank])} without a message of its own"
        )

    def _cause(self, failed: list[int]) -> Failure | None:
        """The failure of the rank that reports; of the first that failed where none does, before they have joined."""
        failures: list[Failure] = []
        for rank in failed:
            path = self._directory / ERROR_FILE.format(rank=rank)
            if path.exists():
                failures.append(pickle.loads(path.read_bytes()))
        for failure in failures:
            if failure.reports:
                return failure
        return failures[0] if failures else None


def _describe_status(status: int) -> str:
    if status < 0:
        return f"was killed by signal {-status} ({signal_name(-status)})"
    return f"ended with status {status}"


def _environments(count: int) -> list[dict[str, str]]:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if count > 1:
        environment.setdefault("OMP_NUM_THREADS", "1")
    return rank_environments(environment, count)
