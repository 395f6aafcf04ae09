"""A `LockstepError` that nothing catches in a program of one's own: one message from one rank, as from a command."""

from __future__ import annotations

import sys
from types import TracebackType

from trainer.config.secrets import remember_argument_secrets
from trainer.errors import LockstepError
from trainer.process.exit import report_error
from trainer.process.parent import record_failure


class UncaughtErrors:
    """A `sys.excepthook` that reports a `LockstepError` and ends with its exit status; others are the hook's before.

    In a W&B sweep both are recorded, as the command `train` does.
    """

    def __init__(self) -> None:
        self._hook_before = sys.excepthook

    def __call__(
        self,
        kind: type[BaseException],
        error: BaseException,
        trace: TracebackType | None,
    ) -> None:
        # A program's arguments are often overrides of its config.
        remember_argument_secrets(sys.argv[1:])
        if not isinstance(error, LockstepError):
            self._hook_before(kind, error, trace)
            if isinstance(error, Exception):
                record_failure(error)
            return
        status = report_error(error)
        record_failure(error)
        if not _is_interactive():
            # Without it the interpreter would end with 1. What is registered with atexit still runs.
            raise SystemExit(status)


def report_uncaught_errors() -> None:
    """Let a `LockstepError` that nothing catches be one message without a traceback, and give the exit status.

    Called again, it does something only if another hook has been set in between. torch sets one when processes join,
    which writes a rank's number before what the hook below it wrote, and loses that where the hook raises.
    """
    if isinstance(sys.excepthook, UncaughtErrors):
        return
    sys.excepthook = UncaughtErrors()


def _is_interactive() -> bool:
    """True at a prompt of Python, and where one follows the program (`python -i`)."""
    return hasattr(sys, "ps1") or bool(sys.flags.inspect)
