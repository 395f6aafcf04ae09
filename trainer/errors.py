"""The errors that users meet. `trainer.process.exit` reports them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LockstepError(Exception):
    """A failure that users can act on: the message names what is wrong and how to fix it. Exit status 1."""

    exit_status = 1


class ConfigError(LockstepError, ValueError):
    """A wrong key, type, value or combination in the config. `key` is the dotted name. Exit status 2."""

    exit_status = 2

    def __init__(self, key: str, message: str) -> None:
        # Both arguments, so that the error can be pickled and sent to other ranks.
        super().__init__(key, message)
        self.key = key
        self.message = message

    def __str__(self) -> str:
        return f"{self.key}: {self.message}"


class DataError(LockstepError, ValueError):
    """A sample, file or directory that cannot be used. Exit status 2."""

    exit_status = 2


class OtherRankFailed(LockstepError):
    """A defect of the program has ended another rank, which shows its traceback. Exit status 1."""


class HangError(LockstepError):
    """The ranks waited for one another in vain. `reporter` is the rank that reports it. Exit status 1."""

    def __init__(self, message: str, reporter: int | None = None) -> None:
        super().__init__(message, reporter)
        self.reporter = reporter

    def __str__(self) -> str:
        return str(self.args[0])


class Stopped(LockstepError):
    """A signal stopped the run at a step boundary, after a complete checkpoint. Exit status 128 + the signal."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message, signal_number)
        self.exit_status = 128 + signal_number

    def __str__(self) -> str:
        return str(self.args[0])


def nearest(word: str, choices: Iterable[str]) -> str:
    """`; did you mean "x"?` for the choice most like `word`; an empty string if none is like it."""
    matches = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f'; did you mean "{matches[0]}"?' if matches else ""
