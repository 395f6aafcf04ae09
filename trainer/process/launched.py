"""One of the processes that `launch` starts: it runs a function and leaves its result, or its error, in a file."""

from __future__ import annotations

import io
import os
import pickle
import signal
import sys
from contextlib import redirect_stderr
from pathlib import Path
from typing import NamedTuple, NoReturn

from trainer.errors import LockstepError
from trainer.process import launcher
from trainer.process.command import begin_command
from trainer.process.exit import describe_error, exit_process, report_error
from trainer.process.parent import end_with_parent

WORK_FILE = "work.pickle"  # the function and its arguments
RESULT_FILE = "result.pickle"  # of rank 0
ERROR_FILE = "error.{rank}.pickle"  # a `Failure`


class Failure(NamedTuple):
    """How a rank failed; `reports` is true on the one whose message is the cause, as far as the ranks could agree."""

    status: int
    message: str
    reports: bool


def main(directory: str) -> NoReturn:
    """Run what `launch` has left in `directory`, and end the process."""
    end_with_parent()
    begin_command()
    status = 0
    try:
        _run(Path(directory))
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except Exception as error:
        status = _leave_error(Path(directory), error)
    exit_process(status)


def _run(directory: Path) -> None:
    # Written by the process that started this one.
    train, arguments = pickle.loads((directory / WORK_FILE).read_bytes())
    result = train(*arguments)
    if launcher.rank() == 0:
        _write(directory / RESULT_FILE, _pickled(result))
    _leave_group()


def _pickled(result: object) -> bytes:
    import cloudpickle

    try:
        content: bytes = cloudpickle.dumps(result)
    except Exception as error:
        raise LockstepError(
            f"launch cannot return a {type(result).__name__} from another process ({error}); return numbers, texts or "
            f"tensors"
        ) from None
    return content


def _leave_group() -> None:
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()


def _leave_error(directory: Path, error: Exception) -> int:
    """Leave this rank's failure in a file; returns the exit status."""
    # The launcher prints it. That this rank would have is what makes it the one whose message is the cause.
    with redirect_stderr(io.StringIO()) as report:
        status = report_error(error)
    failure = Failure(status, describe_error(error), bool(report.getvalue()))
    path = directory / ERROR_FILE.format(rank=launcher.rank())
    _write(path, pickle.dumps(failure))
    return status


def _write(path: Path, content: bytes) -> None:
    # The launcher may kill this process at any moment, and is to find the whole file or none.
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)
