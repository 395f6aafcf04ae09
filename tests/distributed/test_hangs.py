"""A run that hangs ends within its timeout, with one message of who hangs where; one that works is left alone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.programs import Program
from tests.waiting import wait_until
from trainer.storage.files import is_locked

TIMEOUT = 3
STATUS = 1


@contextmanager
def program(
    directory: Path, where: str, seconds: float, *changes: str, ranks: int
) -> Iterator[Program]:
    """`hanging.py` while it runs."""
    script = Path(__file__).with_name("hanging.py")
    arguments = [script, directory, where, seconds, *changes]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    running = Program(arguments, env=environment, ranks=ranks)
    try:
        yield running
    finally:
        running.kill()


def waiting_processes(directory: Path) -> list[int]:
    """The processes that wait in `hanging.py`: ranks, or their loader processes."""
    files = list(directory.glob("waits*"))
    return [int(file.read_text() or 0) for file in files]


def is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def rest(processes: list[int]) -> bool:
    """True if none of the processes does anything for a second."""

    def seconds_used() -> float:
        times = [psutil.Process(process).cpu_times() for process in processes]
        return float(sum(time.user + time.system for time in times))

    before = seconds_used()
    time.sleep(1)
    return seconds_used() - before < 0.05


def check_message(errors: str, *expected: str) -> None:
    """One message, and nothing of PyTorch's or Python's beside it."""
    assert errors.count("error: ") == 1
    assert "Traceback" not in errors
    assert "c10d" not in errors
    for text in expected:
        assert text in errors


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 1)])
def test_a_loader_that_hangs(tmp_path: Path, ranks: int, workers: int) -> None:
    changes = [f"run__timeout={TIMEOUT}", f"data__workers={workers}"]
    with program(tmp_path, "loader", 100, *changes, ranks=ranks) as running:
        wait_until(lambda: waiting_processes(tmp_path))
        started = time.monotonic()
        result = running.wait(180)
    assert time.monotonic() - started < 15 * TIMEOUT
    assert result.returncode == STATUS
    check_message(
        result.stderr,
        "in the loader (train sample ",
        "hanging.py:",
        " in wait_here",
        f"stacks in {tmp_path}/run/hang/stacks_rank0.txt",
    )
    stacks = (tmp_path / "run" / "hang" / "stacks_rank0.txt").read_text()
    assert "in wait_here" in stacks
    # The loader processes do not outlive their rank.
    wait_until(lambda: not any(map(is_alive, waiting_processes(tmp_path))))


def test_a_rank_that_hangs_in_its_own_code(tmp_path: Path) -> None:
    changes = [f"run__timeout={TIMEOUT}"]
    with program(tmp_path, "model", 100, *changes, ranks=2) as running:
        result = running.wait(180)
    assert result.returncode == STATUS
    check_message(
        result.stderr,
        "rank 0 on ",
        "at trainer/core/autograd_engine.py:",
        "rank 1 on ",
        ", in forward and backward, at tests/distributed/hanging.py:",
        " in wait_here; stacks in ",
    )


def test_a_writer_that_hangs(tmp_path: Path) -> None:
    """The other rank waits for as long as rank 0 sends it heartbeats, which it does while it hangs, too."""
    changes = [f"run__timeout={TIMEOUT}"]
    with program(tmp_path, "writer", 100, *changes, ranks=2) as running:
        result = running.wait(180)
    assert result.returncode == STATUS
    check_message(
        result.stderr,
        f"the run made no progress for {TIMEOUT} s (run.timeout):",
        "step 2, in the writer of checkpoints, at tests/distributed/hanging.py:",
        "step 2, in the writer of checkpoints, waiting for the other ranks, at ",
    )


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_is_stopped(tmp_path: Path, stopped: int) -> None:
    """Rank 0 holds the store of all ranks, so nobody else can be asked then."""
    rows = tmp_path / "run" / "metrics.jsonl"
    changes = [f"run__timeout={TIMEOUT}", "train__epochs=100000", "train__log_every=20"]
    with program(tmp_path, "none", 0, *changes, ranks=3) as running:
        wait_until(lambda: rows.exists() and len(rows.read_text().splitlines()) > 40)
        time.sleep(1)
        os.kill(running.pids[stopped], signal.SIGSTOP)
        wait_until(lambda: running.exit_statuses.count(None) == 1)
        statuses = running.exit_statuses
        errors = running.errors()
    assert statuses == [None if rank == stopped else STATUS for rank in range(3)]
    check_message(errors, f"waited {TIMEOUT} s for rank {stopped} on ")
    if stopped:
        line = next(text for text in errors.splitlines() if "rank 1 on" in text[:12])
        assert "silent; " in line
        assert " ago it was in " in line
        assert "  rank 0 on " in errors or "ranks 0, 2 on " in errors


@pytest.mark.parametrize(
    ("where", "seconds", "ranks"), [("evaluation", 0.2, 2), ("first step", 3.5, 1)]
)
def test_what_is_slow_but_works_goes_on(
    tmp_path: Path, where: str, seconds: float, ranks: int
) -> None:
    """An evaluation of 14 batches, and a first step that uses the CPU, each for longer than the timeout."""
    changes = ["run__timeout=2", "batch__eval_size=2", "train__epochs=1"]
    with program(tmp_path, where, seconds, *changes, ranks=ranks) as running:
        result = running.wait(180)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "summary.json").exists()
    assert not (tmp_path / "run" / "hang").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_ends_what_waits(tmp_path: Path, ranks: int) -> None:
    changes = ["data__workers=1"]
    with program(tmp_path, "loader", 100, *changes, ranks=ranks) as running:
        wait_until(lambda: waiting_processes(tmp_path))
        # For the rank to wait for its loader process, too.
        wait_until((tmp_path / "run" / "metrics.jsonl").exists)
        wait_until(lambda: rest(running.pids))
        started = time.monotonic()
        running.send_signal(signal.SIGTERM)
        running.send_signal(signal.SIGTERM)
        result = running.wait(180)
    assert time.monotonic() - started < 30  # after which launchers kill
    assert result.returncode == 128 + signal.SIGTERM
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("stopped by signal 15, but ")
    assert ", in the loader (train sample" in result.stderr


def test_a_killed_rank_is_one_sentence(tmp_path: Path) -> None:
    rows = tmp_path / "run" / "metrics.jsonl"
    with program(tmp_path, "none", 0, "train__epochs=100000", ranks=3) as running:
        wait_until(lambda: rows.exists() and len(rows.read_text().splitlines()) > 10)
        os.kill(running.pids[1], signal.SIGKILL)
        result = running.wait(180)
    check_message(result.stderr, "error: rank 1 on ", "killed")
    assert len(result.stderr.splitlines()) == 1


def test_a_killed_run_leaves_nothing_behind(tmp_path: Path) -> None:
    """Its loader processes hang; the run directory is free at once all the same."""
    with program(
        tmp_path, "loader", 100, "data__workers=2", 'run__proof="off"', ranks=1
    ) as running:
        wait_until(lambda: waiting_processes(tmp_path))
        assert is_locked(tmp_path / "run")
        os.kill(running.pids[0], signal.SIGKILL)
        wait_until(lambda: not running.is_running())
        assert not is_locked(tmp_path / "run")
        wait_until(lambda: not any(map(is_alive, waiting_processes(tmp_path))))
