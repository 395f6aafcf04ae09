"""How a process ends: one rank reports the error, every rank exits with its status, and none waits for another."""

from __future__ import annotations

import atexit
import errno
import multiprocessing
import os
import select
import signal
import sys
import time
import traceback
from functools import cache
from typing import NoReturn

from trainer.config.secrets import redacted_output
from trainer.errors import (
    HangError,
    LockstepError,
    MainRankLost,
    OtherRankFailed,
    Stopped,
)
from trainer.process import launcher
from trainer.process.activity import activity
from trainer.process.command import signals_ignored
from trainer.process.store import StoreSilentError, ask_store

# In the process group's store: the rank that reports the failure.
REPORTER_KEY = "lockstep/failure"
# A launcher kills every rank once one has exited, so the others wait for the reporter.
SECONDS_TO_REPORT = 2.0
# A lost connection is noticed before the rank that caused it has reported why.
SECONDS_TO_NOTICE = 1.0
# The rank with the defect, which waits the second above, is to show its traceback.
SECONDS_TO_TRACE = 0.5
# gloo's thread needs this long to release the tensors of the last collective.
SECONDS_FOR_GLOO = 0.2
# What a shell shows where a reader of the output has ended.
CLOSED_PIPE_STATUS = 128 + signal.SIGPIPE
# What a disk or its permissions refuse: a traceback would tell nothing that the path does not.
REFUSED_BY_DISK = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
)


def report_error(error: BaseException) -> int:
    """Print `error` on one rank only, and return the exit status.

    A `LockstepError` is printed as its message, and so is what a disk refuses; any other error with its traceback.
    When one rank fails, the others fail soon after because it is gone. Only the first rank to get here prints, so its
    message is the cause.
    """
    with signals_ignored():
        return _report(error)


def _report(error: BaseException) -> int:
    if isinstance(error, BrokenPipeError) and _discard_unread_output():
        return CLOSED_PIPE_STATUS
    status = error.exit_status if isinstance(error, LockstepError) else 1
    if not _is_first_to_report(error):
        time.sleep(SECONDS_TO_REPORT)
        return status
    is_message = isinstance(error, LockstepError) or bool(_refusal_of_disk(error))
    is_mistake = is_message and not isinstance(error, Stopped)
    prefix = "error: " if is_mistake else ""
    # The one place where errors are printed.
    print(f"{prefix}{describe_error(error)}", file=sys.stderr, flush=True)
    if launcher.world_size() > 1 and launcher.rank() == 0:
        # It may hold the store, which the others ask whether they are to report.
        time.sleep(SECONDS_TO_NOTICE)
    return status


def describe_error(error: BaseException) -> str:
    """The message of a `LockstepError` or of a disk, of any other error its traceback, without secrets.

    No message needs to think of them by itself.
    """
    if isinstance(error, LockstepError):
        return redacted_output(str(error))
    refusal = _refusal_of_disk(error)
    if refusal:
        return redacted_output(refusal)
    return redacted_output("".join(traceback.format_exception(error)).rstrip())


def _refusal_of_disk(error: BaseException) -> str:
    """The file that a disk or its permissions refuse, and why; "" for any other error."""
    if not isinstance(error, OSError) or error.filename is None:
        return ""
    if error.errno not in REFUSED_BY_DISK:
        return ""
    return f"{error.filename}: {error.strerror}"


def report_interrupt(message: str = "interrupted") -> int:
    """Report a Ctrl-C that acted at once, as one before the training or a second one does; returns the exit status."""
    return report_error(Stopped(message, signal.SIGINT))


def exit_process(status: int) -> NoReturn:
    """End the process with `status`. One rank of several skips the interpreter's shutdown.

    A rank that failed must not wait for the others in a destructor. A rank that is done must not be aborted by gloo:
    gloo's thread needs the interpreter to release the last collective's tensors, and during shutdown it aborts the
    whole process instead ("terminate called without an active exception").
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as while an error is reported
    sys.stdout.flush()
    sys.stderr.flush()
    if launcher.world_size() > 1:
        os._exit(status)
    sys.exit(status)


def end_now(status: int) -> NoReturn:
    """End the process from any thread, whatever the main one waits in, and its loader processes with it."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(status)


def end_on_closed_pipe() -> None:
    """Let the process end without a message when the reader of its output is gone, as in `--help | head`."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


@cache
def delay_exit_for_gloo() -> None:
    """Give gloo's thread time before the interpreter shuts down, for programs that do not use `exit_process`.

    Registered once a process, however often it is called.
    """
    atexit.register(time.sleep, SECONDS_FOR_GLOO)


def _discard_unread_output() -> bool:
    """If stdout is a pipe whose reader is gone, as in `| head -1`, say so and discard what is left to print."""
    stdout = sys.stdout.fileno()
    poll = select.poll()
    poll.register(stdout, 0)
    is_closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if is_closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
        print("stopped: nothing reads its output any more", file=sys.stderr, flush=True)
    return is_closed


def _is_first_to_report(error: BaseException) -> bool:
    """True on the one rank that reports the failure."""
    if launcher.world_size() == 1:
        return True
    from torch import distributed

    if not distributed.is_initialized():
        # Nothing is shared yet. The ranks of a machine read the same config and fail alike; another machine may not.
        return launcher.local_rank() == 0
    if isinstance(error, HangError) and error.reporter is not None:
        return error.reporter == launcher.rank()
    if isinstance(error, MainRankLost):
        return _is_first_without_main()
    if isinstance(error, OtherRankFailed):
        time.sleep(SECONDS_TO_NOTICE + SECONDS_TO_TRACE)
    elif not isinstance(error, LockstepError):
        time.sleep(SECONDS_TO_NOTICE)
    return claim_report()


def claim_report() -> bool:
    """True on the one rank that asks first whether it may report how the run ended."""
    if launcher.world_size() == 1:
        return True
    rank = launcher.rank()
    try:
        reporter: bytes = ask_store(
            lambda store: store.compare_set(REPORTER_KEY, "", str(rank))
        )
    except StoreSilentError:
        # Rank 0 holds the store, and hangs.
        return _is_first_without_main()
    except ConnectionError:
        # The store ended with rank 0, which reported before that, unless it was killed.
        is_killed = activity.is_main_lost is not None and activity.is_main_lost()
        return is_killed and _is_first_without_main()
    return reporter == str(rank).encode()


def _is_first_without_main() -> bool:
    """True on the rank that reports without rank 0: on its machine the next rank, on every other one the first."""
    rank = launcher.rank()
    return rank == 1 or (rank > 0 and launcher.local_rank() == 0)
