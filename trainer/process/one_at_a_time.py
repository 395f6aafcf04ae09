"""One Trainer works at a time in a process: its generators and settings belong to the process, not to a thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from trainer.errors import LockstepError

# One thread may come in again: an observer may train another model.
_lock = threading.RLock()


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """A context for one thread of the process. Raises `LockstepError` while another thread is in it."""
    if not _lock.acquire(blocking=False):
        raise LockstepError(
            "another thread of this process builds or trains a Trainer, and both would draw from the same generators; "
            "train one after the other, or each in a process of its own (trainer.launch)"
        )
    try:
        yield
    finally:
        _lock.release()
