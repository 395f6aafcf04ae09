"""What the watchdog takes for work, what it says of ranks and places, and which settings it leaves to the user."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from trainer.process.activity import COMPUTING, SAVING, Activity
from trainer.process.flight_recorder import VARIABLES, enable_flight_recorder
from trainer.process.rank_states import RankState, listing
from trainer.process.signs_of_life import SignsOfLife
from trainer.process.stacks import error_position, main_thread_position, write_stacks
from trainer.process.watchdog import Watchdog

STATE = RankState("a", 12, "in the loader", "data.py:3 in read", 0.0)


def busy(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


@pytest.fixture
def has_worked() -> Iterator[Callable[[], bool]]:
    """Whether this process has worked since the last call, by a thread that looks."""
    with ThreadPoolExecutor(1) as watchdog:
        signs = watchdog.submit(SignsOfLife).result()

        def look() -> bool:
            return watchdog.submit(signs.look).result()

        look()
        yield look


def test_waiting_is_no_sign_of_life() -> None:
    def look_twice() -> bool:
        signs = SignsOfLife()
        signs.look()
        time.sleep(0.5)
        return signs.look()

    with ThreadPoolExecutor(1) as watchdog:
        assert not watchdog.submit(look_twice).result()


def test_work_is_a_sign_of_life_wherever_it_is_done(
    has_worked: Callable[[], bool],
) -> None:
    busy(0.05)
    assert has_worked()
    thread = threading.Thread(target=busy, args=(0.05,))
    thread.start()
    thread.join()
    assert has_worked()
    program = "while True: pass"
    with subprocess.Popen([sys.executable, "-c", program]) as child:
        time.sleep(1)
        assert has_worked()
        child.kill()


def test_a_first_step_and_a_writer_may_take_any_time() -> None:
    activity = Activity()
    activity.mark(COMPUTING)
    assert not activity.is_bounded
    activity.is_first_step = False
    assert activity.is_bounded
    activity.mark(SAVING)
    assert not activity.is_bounded


def test_ranks_that_do_the_same_are_one_line() -> None:
    states: list[RankState | None] = []
    for rank in range(4):
        stacks = f"runs/r/hang/stacks_rank{rank}.txt"
        states.append(replace(STATE, stacks=stacks))
    states[1] = replace(STATE, machine="b", doing="in the exchange")
    states.append(None)
    assert listing(states) == [
        "ranks 0, 2, 3 on a: step 12, in the loader, at data.py:3 in read; stacks in "
        "runs/r/hang/stacks_rank*.txt",
        "rank 1 on b: step 12, in the exchange, at data.py:3 in read",
        "rank 4: never heard of",
    ]


def test_a_place_is_in_code_that_the_user_knows() -> None:
    here = f"{Path(__file__).relative_to(Path.cwd())}:"
    assert main_thread_position().startswith(here)
    try:
        subprocess.run(["/nonexistent"], check=False)
    except FileNotFoundError as error:
        assert error_position(error.__traceback__).startswith(here)


def test_stacks_go_elsewhere_where_the_runs_disk_takes_none(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "missing"):
        path = write_stacks(directory, "stacks_rank0.txt", {7: "its stack"})
        assert path is not None
        assert path.is_relative_to(tmp_path) == directory.exists()
        assert "test_stacks_go_elsewhere" in path.read_text()
        assert path.read_text().endswith("Loader process 7:\nits stack")
    assert path is not None
    path.unlink()
    path.parent.rmdir()


def test_a_signal_while_it_is_told_of_the_end_is_no_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It wakes the watchdog, which then finds that all is over."""
    watchdog = Watchdog(timeout=60.0)
    watchdog.start()
    write = os.write

    def write_late(descriptor: int, data: bytes) -> int:
        write(descriptor, bytes([signal.SIGINT]))
        watchdog._thread.join(0.2)
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", write_late)
    watchdog.end()
    watchdog._thread.join(60)
    assert not watchdog._thread.is_alive()


def test_the_flight_recorders_size_is_the_users(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv(VARIABLES[1], "7")
    enable_flight_recorder()
    assert VARIABLES[0] not in os.environ
    monkeypatch.delenv(VARIABLES[1])
    enable_flight_recorder()
    assert os.environ[VARIABLES[0]] == "2000"
