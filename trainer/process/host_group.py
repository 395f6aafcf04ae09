"""Agreement of the ranks on the host: plain values over gloo, whatever device the run uses.

Nothing here waits for a GPU. A rank waits for the others at most `timeout` seconds. One that has long work to do while
the others wait sends them a heartbeat, so that only a rank that does nothing is given up.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from itertools import count as count_from
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor, distributed

from trainer.errors import HangError, LockstepError, MainRankLost, OtherRankFailed
from trainer.process.activity import activity
from trainer.process.peers import watch_peers
from trainer.process.rank_states import RankStates
from trainer.process.stacks import error_position
from trainer.process.store import StoreSilentError, ask_store, value_of
from trainer.process.watchdog import STATUS, current_watchdog

# Between the heartbeats of a rank that the others wait for, at most.
HEARTBEAT_SECONDS = 5.0
SECONDS_TO_SHOW = 1.0  # a wait of this length is made known to the other ranks
SECONDS_TO_REPORT = (
    15.0  # another rank's report, which names all ranks, may take as long
)
SECONDS_TO_FIND_ENDED = 2.0  # by the ranks of its machine
STORE_PREFIX = "lockstep/waiting"

# What ranks say while some have work to do that the others wait for; the largest value counts.
DONE, FAILED, BUSY = 0, 1, 2
STILL_WORKING = -1  # in place of the size of what the main process sends

TIMEOUT_MESSAGES = ("Timed out waiting", "timed out", "Timeout")
LOST_CONNECTION_MESSAGES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
)

_group_numbers = count_from()  # Each process makes its groups in the same order.


class HostGroup:
    """The gloo group of `count` ranks, of which this process is `rank`. Joined by all ranks together.

    `machines` are the host names of the ranks' machines, in rank order.
    """

    def __init__(self, rank: int, count: int, timeout: float) -> None:
        self.rank = rank
        self.count = count
        self.timeout = timeout
        self._prefix = f"{STORE_PREFIX}/{next(_group_numbers)}"
        self._is_shown_as_waiting = False
        self._group: Any = None
        self.machines = [socket.gethostname()] * count
        if count > 1:
            self._group = distributed.new_group(
                backend="gloo", timeout=timedelta(seconds=timeout)
            )
            self._meet_others()

    def _meet_others(self) -> None:
        """Learn where each rank is, and watch those of this machine."""
        processes = self.gather((socket.gethostname(), os.getpid()))
        self.machines = [machine for machine, _ in processes]
        peers = []
        for rank, (machine, process) in enumerate(processes):
            if rank != self.rank and machine == self.machines[self.rank]:
                peers.append((rank, process))
        self._peers = watch_peers(frozenset(peers))

    # ---------------------------------------------------------------- collective operations

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order, on every rank."""
        if self.count == 1:
            return [value]
        padded, sizes = self._pad(value)
        parts = [torch.empty_like(padded) for _ in sizes]
        self._run(partial(distributed.all_gather, parts, padded))
        return _unpad(parts, sizes)

    def to_main(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order, on rank 0 alone; an empty list on the others."""
        if self.count == 1:
            return [value]
        padded, sizes = self._pad(value)
        if self.rank != 0:
            self._run(partial(distributed.gather, padded, None, 0))
            return []
        parts = [torch.empty_like(padded) for _ in sizes]
        self._run(partial(distributed.gather, padded, parts, 0))
        return _unpad(parts, sizes)

    def _pad(self, value: Any) -> tuple[Tensor, list[int]]:
        """`value` as bytes, padded to those of the rank that has the most; and how many each rank has."""
        data = _to_bytes(value)
        own_size = torch.tensor([len(data)])
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        self._run(partial(distributed.all_gather, sizes, own_size))
        lengths = [int(size) for size in sizes]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(data)] = data
        return padded, lengths

    def from_main(self, action: Callable[[], Any]) -> Any:
        """What `action` returns on rank 0, on every rank. The others wait for as long as it takes."""
        if self.count == 1:
            return action()
        if self.rank == 0:
            with self._heartbeat(
                partial(self._broadcast, torch.tensor([STILL_WORKING]))
            ):
                value = action()
            data = _to_bytes(value)
            self._broadcast(torch.tensor([len(data)]))
            self._broadcast(data)
            return value
        size = torch.tensor([STILL_WORKING])
        while int(size) == STILL_WORKING:
            self._broadcast(size)
            activity.go_on()
        data = torch.empty(int(size), dtype=torch.uint8)
        self._broadcast(data)
        return _from_bytes(data)

    def any_each(self, flags: list[bool]) -> list[bool]:
        """For each flag, whether it is true on any rank."""
        largest = self.largest_each_async([int(flag) for flag in flags])
        return list(map(bool, largest()))

    def largest_each_async(self, values: list[int]) -> Callable[[], list[int]]:
        """Start asking for the largest of all ranks' values in each place, from 0 to 255. The function waits for it."""
        if self.count == 1:
            return lambda: values
        votes = torch.tensor(values, dtype=torch.uint8)
        work = distributed.all_reduce(
            votes, distributed.ReduceOp.MAX, group=self._group, async_op=True
        )

        def answer() -> list[int]:
            self._wait(work)
            largest: list[int] = votes.tolist()
            return largest

        return answer

    @contextmanager
    def first(self, is_first: bool) -> Iterator[None]:
        """A context whose body runs on ranks with `is_first`, and then on the others.

        Where it fails on a rank with `is_first`, no other runs it: they raise `LockstepError`, the rank its own error.
        """
        failure: Exception | None = None
        if is_first:
            try:
                with self._heartbeat(partial(self._largest, BUSY)):
                    yield
            except Exception as error:
                # Raised once the other ranks have heard of it.
                failure = error
        self._await_first(failure)
        if not is_first:
            yield

    def _await_first(self, failure: Exception | None) -> None:
        """Wait until no rank is busy. Raises if the work of any rank failed."""
        if self.count == 1:
            if failure is not None:
                raise failure
            return
        outcome = BUSY
        while outcome == BUSY:
            outcome = self._largest(DONE if failure is None else FAILED)
            activity.go_on()
        if outcome == DONE:
            return
        failures = self.gather(
            None if failure is None else _to_send(failure, self.rank, self.machines)
        )
        if failure is not None:
            raise failure
        raise next(error for error in failures if error is not None)

    def _largest(self, value: int) -> int:
        """The largest of all ranks' values."""
        vote = torch.tensor(value)
        self._run(partial(distributed.all_reduce, vote, distributed.ReduceOp.MAX))
        return int(vote)

    def _broadcast(self, tensor: Tensor) -> None:
        self._run(partial(distributed.broadcast, tensor, 0))

    def _run(self, operation: Callable[..., Any]) -> None:
        self._wait(operation(group=self._group, async_op=True))

    @contextmanager
    def _heartbeat(self, beat: Callable[[], object]) -> Iterator[None]:
        """While the body runs, call `beat` again and again in a thread, so that the other ranks go on waiting."""
        if self.count == 1:
            yield
            return
        end = Event()
        failures: list[Exception] = []
        interval = min(HEARTBEAT_SECONDS, self.timeout / 4)

        def beat_until_end() -> None:
            while not end.wait(interval):
                try:
                    beat()
                except Exception as error:
                    # Raised by the thread whose body runs: nobody would see it here.
                    failures.append(error)
                    return

        thread = Thread(target=beat_until_end, daemon=True, name="heartbeat")
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()
        if failures:
            raise failures[0]

    # ---------------------------------------------------------------- waiting, and giving up

    def _wait(self, work: Any) -> None:
        """Wait for an operation. Raises `LockstepError` naming the ranks that did not come within the timeout."""
        activity.waits_for_ranks = True
        try:
            if not _ends_within(work, min(SECONDS_TO_SHOW, self.timeout / 2)):
                self._show_waiting(True)
                work.wait()
        except RuntimeError as error:
            absence = self.explain(error)
            if absence is None:
                raise
            raise absence from None
        activity.waits_for_ranks = False
        if self._is_shown_as_waiting:
            self._show_waiting(False)

    def _show_waiting(self, is_waiting: bool) -> None:
        """Let the other ranks know whether this one waits: whoever gives up names those that do not."""
        self._is_shown_as_waiting = is_waiting
        with suppress(ConnectionError):
            ask_store(
                lambda store: store.set(
                    f"{self._prefix}/{self.rank}", str(int(is_waiting))
                )
            )

    def explain(self, error: RuntimeError) -> LockstepError | None:
        """The error in terms of ranks, if a collective operation timed out, here or on another rank; else None."""
        message = str(error)
        is_timeout = any(words in message for words in TIMEOUT_MESSAGES)
        is_connection_lost = any(words in message for words in LOST_CONNECTION_MESSAGES)
        if self.count == 1 or not (is_timeout or is_connection_lost):
            return None
        activity.position = error_position(error.__traceback__)
        activity.waits_for_ranks = True
        if not self._is_shown_as_waiting and is_timeout:
            # The operation was the device's, which does not show who waits.
            self._show_waiting(True)
        states = RankStates(self.rank, self.count)
        try:
            if is_timeout:
                return self._report(states)
            # Written before the rank that wrote it ended.
            report = states.wait_for_report(SECONDS_TO_SHOW / 2)
            return self._describe_ended(states) if report is None else report
        except StoreSilentError:
            return self._report_alone() if is_timeout else None
        except ConnectionError:
            return self._describe_lost_main()

    def _describe_lost_main(self) -> LockstepError | None:
        """What a rank raises where the store has ended with rank 0, unless that has said why."""
        if activity.is_main_lost is None or not activity.is_main_lost():
            return None
        return MainRankLost(self._describe_losses([0]))

    def _describe_ended(self, states: RankStates) -> LockstepError | None:
        """What a rank raises whose connection was lost, unless the rank that ended has said why, and is heard first."""
        ended = states.find_ended(self.machines[self.rank], SECONDS_TO_FIND_ENDED)
        if not ended:
            return None
        return OtherRankFailed(self._describe_losses(ended))

    def _describe_losses(self, ranks: Sequence[int]) -> str:
        """How ranks ended that said nothing, and what to do."""
        losses = []
        for rank in ranks:
            loss = self._peers.describe(rank)
            losses.append(f"rank {rank} on {self.machines[rank]} {loss}")
        text = ", ".join(losses)
        signals = [self._peers.signals.get(rank) for rank in ranks]
        if signal.SIGKILL in signals or None in signals:
            text += ", perhaps because memory ran out (the system's log says so)"
        return f"{text}; run.resume=auto goes on from the newest checkpoint"

    def _report(self, states: RankStates) -> HangError:
        """What all ranks raise where a wait has timed out; the first of them writes it."""
        watchdog = current_watchdog()
        if not states.claim(STATUS):
            if watchdog is not None:
                states.answer(watchdog.report.last_state())
            report = states.wait_for_report(SECONDS_TO_REPORT)
            if report is not None:
                return report
        if watchdog is not None:
            return HangError(watchdog.report.make(self._describe_absent), self.rank)
        time.sleep(SECONDS_TO_SHOW)  # the others give up at about this time
        message = (
            f"{self._describe_absent([])}; where that rank works on, raise run.timeout, else its own output or "
            f"`py-spy dump` says where it hangs"
        )
        states.set_report(message)
        return HangError(message, self.rank)

    def _report_alone(self) -> HangError:
        """What a rank raises that can ask no other: the store does not answer, whose process is rank 0's, mostly."""
        is_of_rank_0 = "TORCHELASTIC_USE_AGENT_STORE" not in os.environ
        absent = f"rank 0 on {self.machines[0]}" if is_of_rank_0 else "one another"
        message = f"the ranks waited {self.timeout:g} s for {absent}, and no longer"
        watchdog = current_watchdog()
        if watchdog is not None:
            message = watchdog.report.make(lambda _: message)
        return HangError(message)

    def _describe_absent(self, silent: Sequence[int]) -> str:
        """Who was waited for: the ranks that are `silent`, or else those that wait for no other."""
        absent = silent or [
            rank
            for rank in range(self.count)
            if rank != self.rank and not self._is_waiting(rank)
        ]
        names = ", ".join(f"rank {rank} on {self.machines[rank]}" for rank in absent)
        return f"the ranks waited {self.timeout:g} s for {names or 'one another'}, and no longer"

    def _is_waiting(self, rank: int) -> bool:
        value = ask_store(partial(value_of, key=f"{self._prefix}/{rank}"))
        return bool(value == b"1")


def _ends_within(work: Any, seconds: float) -> bool:
    """True if an operation ends within so many seconds; raises if it fails. It goes on if it does not end."""
    if work.is_completed():
        work.wait()
        return True
    try:
        work.wait(timedelta(seconds=seconds))
    except RuntimeError:
        if work.is_completed():
            raise
        return False
    return True


def _to_send(error: Exception, rank: int, machines: list[str]) -> LockstepError:
    """What other ranks raise where this one failed."""
    if isinstance(error, LockstepError):
        return error
    return OtherRankFailed(f"rank {rank} on {machines[rank]} failed: {error}")


def _unpad(parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Any]:
    """The values of all ranks, from what `_pad` made of them."""
    return [_from_bytes(part[:size]) for part, size in zip(parts, sizes, strict=True)]


def _to_bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _from_bytes(data: Tensor) -> Any:
    return pickle.loads(data.numpy().tobytes())
