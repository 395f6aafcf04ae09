"""The errors that users meet. `trainer.process.exit` reports them."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Sequence


class LockstepError(Exception):
    """A failure that users can act on: the message names what is wrong and how to fix it. Exit status 1."""

    exit_status = 1

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: in a notebook too, a user's mistake is one message without a traceback."""
        return [f"error: {self}"]


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


class UnreadableError(DataError):
    """Data that could not be read this time, though they may be whole: see `may_pass`. Exit status 1."""

    exit_status = 1


class OtherRankFailed(LockstepError):
    """A defect of the program has ended another rank, which shows its traceback. Exit status 1."""


class MainRankLost(OtherRankFailed):
    """Rank 0 has ended without a word, and with it the store by which ranks agree on who reports. Exit status 1."""


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

    def _render_traceback_(self) -> list[str]:
        return [str(self)]

    def __str__(self) -> str:
        return str(self.args[0])


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the name of its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def listed(items: Sequence[str], most: int) -> str:
    """`a, b and 3 more`: the first items, at most `most`, and how many others there are."""
    more = len(items) - most
    others = f" and {more} more" if more > 0 else ""
    return ", ".join(items[:most]) + others


def first_few(items: Sequence[object], most: int) -> str:
    """`a, b, …`: the first items, at most `most`, where the number of the others says nothing."""
    shown = ", ".join(map(str, items[:most]))
    return f"{shown}, …" if len(items) > most else shown


def nearest(word: str, choices: Iterable[str]) -> str:
    """`; did you mean "x"?` for the choice most like `word`; an empty string if none is like it."""
    matches = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f'; did you mean "{matches[0]}"?' if matches else ""


# What a file system says of a path that is not there, not permitted or no file: it says the same the next time.
LASTING_ERRNOS = frozenset(
    {
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.EINVAL,
        errno.EILSEQ,
        errno.EEXIST,
        errno.ENOTEMPTY,
        errno.ENXIO,
    }
)
# torch has an error of its own for the memory of GPUs only.
OUT_OF_MEMORY = ("can't allocate memory", "out of memory")


def may_pass(cause: BaseException) -> bool:
    """True for an error of the disk, the network, memory or a limit of the system: a retry may find it gone.

    Not for what decoders raise of a damaged file, which is often an `OSError` without a number.
    """
    if isinstance(cause, MemoryError | ConnectionError | TimeoutError):
        return True
    if isinstance(cause, OSError):
        return cause.errno is not None and cause.errno not in LASTING_ERRNOS
    if isinstance(cause, RuntimeError):
        return any(text in str(cause) for text in OUT_OF_MEMORY)
    return False


def data_error(message: str, cause: BaseException) -> DataError:
    """The error for data that `cause` kept from being read: exit status 1 if a retry may mend it, else 2."""
    return UnreadableError(message) if may_pass(cause) else DataError(message)


def config_error(key: str, message: str, cause: BaseException) -> LockstepError:
    """The error for a key whose value `cause` kept from being used: exit status 1 if a retry may mend it, else 2."""
    if may_pass(cause):
        return LockstepError(f"{key}: {message}")
    return ConfigError(key, message)
