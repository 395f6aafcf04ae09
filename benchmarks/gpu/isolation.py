"""A function in a process of its own, with a time limit: an error, a crash or a hang stays there."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks import processes
from trainer.process.parent import signal_name

SECONDS_TO_END = 5.0  # after the result is here


@dataclass(frozen=True)
class Failure:
    """Why there is no result, in one line."""

    reason: str


def run_isolated(
    function: Callable[..., Any], *args: Any, limit: float, log: Path
) -> Any:
    """What `function(*args)` returns or, as a value, raises; a `Failure` if it crashes or takes over `limit` seconds.

    `function`, what it takes and what it gives must be picklable. What it prints goes to the file `log`.
    """
    receiver, sender = processes.CLEAN.Pipe(duplex=False)
    process = processes.CLEAN.Process(
        target=_in_child, args=(function, args, sender, str(log))
    )
    deadline = time.monotonic() + limit
    process.start()
    sender.close()
    try:
        if not receiver.poll(max(0.0, deadline - time.monotonic())):
            return Failure(f"not done within {limit:.0f} s")
        return pickle.loads(receiver.recv_bytes())
    except EOFError:
        process.join(SECONDS_TO_END)
        return Failure(f"its process ended with {_status(process.exitcode)}")
    finally:
        _end(process)


def _in_child(
    function: Callable[..., Any], args: tuple[Any, ...], pipe: Connection, log: str
) -> None:
    # A group of its own, which is ended as a whole.
    os.setpgrp()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # Of loader processes, as in a process started by hand.
    multiprocessing.set_start_method("fork", force=True)
    processes.allow_fork()
    try:
        result = function(*args)
    except Exception as error:
        traceback.print_exc()
        result = error
    pipe.send_bytes(_pickled(result))
    pipe.close()
    # Not the interpreter's way out, which waits for threads of libraries.
    os._exit(0)


def _pickled(result: Any) -> bytes:
    try:
        data = pickle.dumps(result)
        # Some exceptions can be pickled and not read back.
        pickle.loads(data)
    except Exception:
        return pickle.dumps(RuntimeError(f"{type(result).__name__}: {result}"))
    return data


def _end(process: Any) -> None:
    """End the process and those that it has started."""
    process.join(0.2)
    if process.pid is not None:
        with suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
    process.join(SECONDS_TO_END)


def _status(code: int | None) -> str:
    if code is not None and code < 0:
        return signal_name(-code)
    return f"status {code}"
