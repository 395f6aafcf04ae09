"""The process group's store, for what ranks leave for one another while they no longer agree.

It lives in the launcher or in rank 0, either of which may have ended or hang, so no question to it waits for long.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from threading import Thread
from typing import Any

SECONDS_TO_ANSWER = 5.0
SECONDS_TO_CONNECT = 2.0


class StoreSilentError(ConnectionError):
    """The store does not answer, though the connection stands: the process that holds it hangs."""


class StoreClient:
    """A connection of one's own to the store, so that no other question holds up this one. For one thread."""

    def __init__(self) -> None:
        self._store: Any = None
        self._pending: Thread | None = None

    def ask(self, question: Callable[[Any], Any]) -> Any:
        """What `question`, called with the store, returns. Raises `ConnectionError` if there is no answer in time."""
        if self._pending is not None and self._pending.is_alive():
            # The one before has not been answered, and holds the connection.
            raise StoreSilentError("the store does not answer")
        answer, self._pending = _ask(lambda: question(self._connection()))
        return answer()

    def _connection(self) -> Any:
        if self._store is None:
            self._store = _default_store().clone()
        return self._store


def ask_store(question: Callable[[Any], Any]) -> Any:
    """What `question`, called with the store, returns. Raises `ConnectionError` if there is no answer in time."""
    answer, _ = _ask(lambda: question(_default_store()))
    return answer()


def value_of(store: Any, key: str) -> bytes | None:
    """The value of a key; None if nobody has set it, for which `get` would wait."""
    if not store.check([key]):
        return None
    value: bytes = store.get(key)
    return value


def _ask(question: Callable[[], Any]) -> tuple[Callable[[], Any], Thread]:
    """Start a thread that asks. The function returned waits for the answer."""
    _check_reachable()
    answers: list[Any] = []
    failures: list[Exception] = []

    def ask() -> None:
        try:
            answers.append(question())
        except Exception as error:
            # Told by the thread that asked: nobody would see it here.
            failures.append(error)

    def answer() -> Any:
        thread.join(SECONDS_TO_ANSWER)
        if answers:
            return answers[0]
        if failures:
            raise ConnectionError(f"the store is gone: {failures[0]}")
        raise StoreSilentError("the store does not answer")

    # In a thread, which is left behind if the store hangs: its own calls wait for as long as the group's timeout.
    thread = Thread(target=ask, daemon=True, name="store")
    thread.start()
    return answer, thread


def _check_reachable() -> None:
    """Raise `ConnectionError` if nothing listens where the store was: PyTorch prints pages when it finds out itself."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not host or not port:
        return
    try:
        socket.create_connection((host, int(port)), SECONDS_TO_CONNECT).close()
    except TimeoutError:
        raise StoreSilentError("the store's machine does not answer") from None
    except OSError as error:
        raise ConnectionError(f"the store is gone: {error}") from None


def _default_store() -> Any:
    # Imported here: an error may be reported before torch is needed.
    from torch import distributed

    return distributed.distributed_c10d._get_default_store()
