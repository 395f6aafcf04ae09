"""Snapshots written in the background: training goes on as soon as its tensors are copied."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from trainer.process.activity import activity
from trainer.process.free_memory import share_of_main_memory
from trainer.storage.host_copies import HostCopies, Key
from trainer.storage.snapshot import Snapshot

GIB = 2**30

Check = Callable[[Sequence[Tensor]], None]


class SnapshotWriter:
    """Writes one snapshot after the other, in a thread; the next waits for the last, and then overwrites its copies.

    What goes wrong in the thread is raised by the next `write` or `wait`. After that, nothing more is written.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        """`note` shows a line to the user."""
        self._note = note
        self._copies = HostCopies()
        self._has_room = True
        self._thread: ThreadPoolExecutor | None = None
        self._thread_id: int | None = None
        self._last: Future[None] | None = None

    def write(
        self,
        snapshot: Snapshot,
        write: Callable[[Snapshot], None],
        check: Check | None = None,
    ) -> None:
        """Call `write` with a copy of `snapshot`, in the background; here and now where memory has no room for it.

        `check` comes first, here in any case, and is given the tensors that copying has shown to be finite.
        """
        self.wait()
        tensors = snapshot.tensors()
        if not self._has_room_for(tensors):
            if check is not None:
                check([])
            write(snapshot)
            return
        copies = self._copies.copy(tensors, look=check is not None)
        if check is not None:
            check(copies.finite)
        copy = snapshot.with_copies(copies.tensors, copies.arrive)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "writer of checkpoints")
        self._last = self._thread.submit(self._work, write, copy)

    def _work(self, write: Callable[[Snapshot], None], snapshot: Snapshot) -> None:
        self._thread_id = threading.get_ident()
        write(snapshot)

    def _has_room_for(self, tensors: Mapping[Key, Tensor]) -> bool:
        missing = self._copies.missing(tensors)
        return not missing or self._finds_room(missing)

    def _finds_room(self, size: int) -> bool:
        if not self._has_room:
            return False
        available = share_of_main_memory()
        if size > available:
            self._has_room = False  # for good: it is said once
            self._note(
                f"checkpoints are written while training waits: a copy of the run's state takes {size / GIB:.1f} GiB "
                f"of main memory, and there is room for {available / GIB:.1f} GiB"
            )
        return self._has_room

    def wait(self) -> None:
        """Wait until the last snapshot is written. Raises what went wrong, once."""
        last, self._last = self._last, None
        if last is None:
            return
        activity.waits_for_thread = self._thread_id
        try:
            last.result()
        finally:
            activity.waits_for_thread = None

    def close(self) -> BaseException | None:
        """Wait for the last snapshot and end the thread; returns what went wrong, if nobody was told of it yet."""
        try:
            self.wait()
        except Exception as error:
            return error
        finally:
            if self._thread is not None:
                self._thread.shutdown()
                self._thread = None
        return None
