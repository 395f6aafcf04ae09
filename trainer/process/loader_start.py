"""What may go wrong where loader processes are not forked: each imports the program anew, and gets copies by pickle.

So it is on macOS, from Python 3.14 on also on Linux, and wherever a program chooses it.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError, LockstepError

# The exit status of a process that meets a training while it imports the program.
TRAINS_AT_IMPORT = 87
SECONDS_TO_END = 1.0  # from a closed connection to the end of the process behind it


def end_if_imported_to_load() -> None:
    """End this process, without a word, if it imports the program in order to load samples for another.

    It would train in the midst of that, once more. The process that it was to load for says so.
    """
    # By what multiprocessing itself tells it: there is no public way.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        os._exit(TRAINS_AT_IMPORT)


def trains_at_import() -> ConfigError:
    """The message of the process that asked for loader processes."""
    return ConfigError(
        "data.workers",
        f"loader processes are started by {multiprocessing.get_start_method()} here, so each imports the program, and "
        'would train again: put what makes and calls the Trainer under `if __name__ == "__main__":`, or set '
        "data.workers=0",
    )


def server_failure() -> LockstepError:
    """The message where the server that forks loader processes ended while it was asked for one."""
    if _server_status() == TRAINS_AT_IMPORT:
        return trains_at_import()
    return LockstepError(
        "the process that starts loader processes was killed while it started one; start the run again, with "
        "run.resume=auto"
    )


def _server_status() -> int | None:
    """The exit status of the server, once it has ended; None where it cannot be told."""
    # There is no public way to it.
    server: Any = getattr(forkserver, "_forkserver", None)
    process = getattr(server, "_forkserver_pid", None)
    if process is None:
        return None
    until = time.monotonic() + SECONDS_TO_END
    with suppress(ChildProcessError):
        while time.monotonic() < until:
            # It stays to be waited for: `forkserver` does so when it next wants one.
            ended = os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is not None:
                return ended.si_status
            time.sleep(0.05)
    return None


def is_copy_failure(error: BaseException) -> bool:
    """True if `error` was raised where multiprocessing pickles what another process is to get."""
    for frame in traceback.extract_tb(error.__traceback__):
        is_of_pickler = Path(frame.filename).parts[-2:] == (
            "multiprocessing",
            "reduction.py",
        )
        if is_of_pickler and frame.name.startswith("dump"):
            return True
    return False


def is_copyable(value: object) -> bool:
    """True if pickle can copy `value` to another process, as far as that can be told without starting one."""
    try:
        ForkingPickler.dumps(value)
    except RuntimeError:
        # Locks and their like, which go along only while a process is started.
        return True
    except Exception:
        return False
    return True


def copy_failure(error: BaseException, part: str) -> ConfigError:
    """The message for `part` of what loader processes need, which pickle cannot copy."""
    return ConfigError(
        "data.workers",
        f"loader processes are started by {multiprocessing.get_start_method()} here, so pickle copies to them what "
        f"they need, and it cannot copy {part} ({type(error).__name__}: {error}); open files, locks and connections "
        "when the first sample is read, define classes and functions at the top of a module, or set data.workers=0; on "
        'Linux, multiprocessing.set_start_method("fork") before the Trainer is made copies nothing',
    )


def explain_early_end(process: int, exit_status: int) -> LockstepError | None:
    """The message for a loader process that ended before it had what it needs; None where it was forked."""
    if exit_status == TRAINS_AT_IMPORT:
        return trains_at_import()
    method = multiprocessing.get_start_method()
    if method == "fork" or exit_status < 0:
        return None
    return LockstepError(
        f"loader process {process}, started by {method}, ended with status {exit_status} while it imported what it "
        "needs, and has said why above; classes and functions of a prompt, a notebook's cell or `python -c` cannot be "
        "imported: put them into a file, or set data.workers=0"
    )
