"""The process group's store, for what ranks leave for one another while they no longer agree.

It lives in the launcher or in rank 0, either of which may have ended or hang, so no question to it waits for long.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from threading import Thread
from typing import Any

SECONDS_TO_ANSWER = 5.0


def ask_store(question: Callable[[Any], Any]) -> Any:
    """What `question`, called with the store, returns. Raises `ConnectionError` if there is no answer in time."""
    answers: list[Any] = []

    def ask() -> None:
        # Imported here: an error may be reported before torch is needed.
        from torch import distributed

        with suppress(Exception):
            answers.append(question(distributed.distributed_c10d._get_default_store()))

    thread = Thread(target=ask, daemon=True, name="store")
    thread.start()
    thread.join(SECONDS_TO_ANSWER)
    if not answers:
        raise ConnectionError("the store does not answer")
    return answers[0]


def value_of(store: Any, key: str) -> bytes | None:
    """The value of a key; None if nobody has set it, for which `get` would wait."""
    if not store.check([key]):
        return None
    value: bytes = store.get(key)
    return value
