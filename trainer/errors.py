"""What goes wrong, said once: the errors a user meets, and the one place that prints them."""

from __future__ import annotations

import difflib
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Iterable
from contextlib import suppress
from typing import NoReturn

REPORTED = "lockstep/failure"  # the key, in the process group's store, of the rank that reports a failure


class LockstepError(Exception):
    """A failure a user can act on: its text names what is wrong and the fix. Exit status 1."""

    exit_status = 1


class ConfigError(LockstepError, ValueError):
    """A wrong key, type, value or combination of the config. `key` is its dotted name. Exit status 2."""

    exit_status = 2

    def __init__(self, key: str, message: str) -> None:
        super().__init__(key, message)  # as given: errors travel between processes
        self.key = key
        self.message = message

    def __str__(self) -> str:
        return f"{self.key}: {self.message}"


class DataError(LockstepError, ValueError):
    """A sample, file or folder that cannot be used. Exit status 2."""

    exit_status = 2


class Stopped(LockstepError):
    """A signal ended the run at a step boundary, a complete checkpoint behind it. Exit status 128 + signal."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message, signal_number)
        self.exit_status = 128 + signal_number

    def __str__(self) -> str:
        return str(self.args[0])


def nearest(word: str, choices: Iterable[str]) -> str:
    """`; did you mean "x"?` for the choice nearest to `word`, or nothing where none is near."""
    matches = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f'; did you mean "{matches[0]}"?' if matches else ""


def report(error: BaseException) -> int:
    """Print `error` from one rank only and return the exit status.

    A `LockstepError` prints as its message, anything else as its traceback. When one rank fails, the others
    fail soon after because it is gone; only the first to get here prints, so the cause is what one reads.
    """
    if isinstance(error, BrokenPipeError) and _nobody_reads():
        return 128 + signal.SIGPIPE
    status = error.exit_status if isinstance(error, LockstepError) else 1
    if not _first_to_report(error):
        time.sleep(2.0)  # launchers end every process once one has exited: let the reporter finish its sentence
        return status
    if isinstance(error, LockstepError):
        prefix = "" if isinstance(error, Stopped) else "error: "
        print(f"{prefix}{error}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)
        sys.stderr.flush()
    return status


def _nobody_reads() -> bool:
    """Whether stdout is a pipe whose reader has gone, as in `| head -1`; then what is left to print is dropped."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    print("stopped: nothing reads its output any more", file=sys.stderr, flush=True)
    return True


def leave(status: int) -> NoReturn:
    """End the process; one of several without the interpreter's own way out.

    A rank that failed must not wait for the others in some destructor. And one that is done may not be ended by gloo:
    its thread drops the last collective's tensors, for which it needs the interpreter, and where that is going down
    already, the whole process aborts ("terminate called without an active exception").
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(status)
    sys.exit(status)


def _first_to_report(error: BaseException) -> bool:
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return True
    from torch import distributed

    if not distributed.is_initialized():
        return rank == 0  # every rank reads the same config and fails alike
    if not isinstance(error, LockstepError):
        time.sleep(1.0)  # a lost connection is noticed before its cause is told
    with suppress(Exception):
        store = distributed.distributed_c10d._get_default_store()
        return store.compare_set(REPORTED, "", str(rank)) == str(rank).encode()
    return False  # the store is gone, and with it the rank that held it and spoke first
