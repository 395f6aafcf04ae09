"""A forked program behaves as in an interpreter of its own: streams, status, environment, signals, exit handlers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.programs import Program, run_program

# What a fresh interpreter does, too: programs that end in every way there is, with text in two streams.
PROGRAMS = [
    "print('é'); import sys; print('two', file=sys.stderr)",
    "import sys; sys.exit()",
    "import sys; sys.exit(3)",
    "import sys; sys.exit('a reason')",
    "import os; os._exit(7)",
    "import atexit; atexit.register(print, 'last'); print('first')",
    "import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()",
    "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "import sys; print(sys.argv, __name__, sys.stdin.read(), sys.stdout.isatty(), sys.stderr.line_buffering)",
    "import os; print(sorted(os.environ.items()), os.getcwd())",
    "import multiprocessing; print(multiprocessing.get_start_method())",
    "import signal; print([signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)])",
    "print(len(__import__('os').listdir('/proc/self/task')))",
]


@pytest.mark.fresh_process  # the thing that a fork is compared with
@pytest.mark.parametrize("code", PROGRAMS)
def test_it_ends_as_a_fresh_process_does(tmp_path: Path, code: str) -> None:
    environment = {
        "A": "b",
        "PATH": os.environ["PATH"],
        "OMP_NUM_THREADS": "1",
        "LC_CTYPE": "C.UTF-8",
    }
    fork = run_program(["-c", code, "x"], env=environment, cwd=tmp_path)
    fresh = subprocess.run(
        [sys.executable, "-c", code, "x"],
        env=environment,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (fork.returncode, fork.stdout, fork.stderr) == (
        fresh.returncode,
        fresh.stdout,
        fresh.stderr,
    )


def test_an_error_is_a_traceback_and_status_1(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import neighbour\nneighbour.fail()\n")
    (tmp_path / "neighbour.py").write_text("def fail(): raise ValueError('odd')\n")
    done = run_program([script])
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("ValueError: odd\n")


def endless() -> Program:
    """A program that has said `on`, and waits."""
    program = Program(["-c", "import time; print('on', flush=True); time.sleep(600)"])
    while not program.output():
        assert program.is_running()
        time.sleep(0.01)
    return program


def test_an_interrupt_ends_it_by_the_signal() -> None:
    program = endless()
    program.send_signal(signal.SIGINT)
    done = program.wait(180)
    assert done.returncode == -signal.SIGINT
    assert done.stderr.endswith("KeyboardInterrupt\n")


def test_a_program_that_does_not_end_is_killed() -> None:
    program = endless()
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        program.wait(1)
    assert caught.value.stdout == "on\n"
    assert not program.is_running()


def test_ranks_have_an_environment_of_their_own_and_one_failure_ends_all() -> None:
    code = (
        "import os, sys, time; print(os.environ['RANK'], os.environ['WORLD_SIZE'], flush=True);"
        "sys.exit(5) if os.environ['RANK'] == '1' else time.sleep(600)"
    )
    done = run_program(["-c", code], ranks=3, timeout=120)
    assert done.returncode == 5
    lines = done.stdout.splitlines()
    assert "1 3" in lines
    assert set(lines) <= {"0 3", "1 3", "2 3"}


def test_another_number_of_threads_takes_a_fresh_process() -> None:
    with pytest.raises(ValueError, match="OMP_NUM_THREADS"):
        run_program(["-c", ""], env={})
