"""A rank that is killed is named in one sentence by one of the others, also where the ranks' store dies with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.test_directory_gone import start
from trainer.process.parent import signal_name
from trainer.process.peers import Peers

# The parent of the tests' programs asks for a status at once, after which nobody can know the signal.
UNKNOWN = "ended without an error of its own"


@pytest.mark.parametrize(("killed", "ranks"), [(0, 2), (1, 2), (0, 3)])
def test_a_killed_rank_is_named_once(killed: int, ranks: int, tmp_path: Path) -> None:
    program, _ = start(tmp_path, ranks)
    os.kill(program.pids[killed], signal.SIGKILL)
    while program.is_running():
        # A launcher sends it once, at a moment of its own.
        for rank in range(ranks):
            with suppress(ProcessLookupError):
                if rank != killed:
                    os.kill(program.pids[rank], signal.SIGTERM)
        time.sleep(0.02)
    end = program.wait(180)

    lines = [line for line in end.stderr.splitlines() if line]
    (line,) = lines
    assert line.startswith(f"error: rank {killed} on ")
    assert UNKNOWN in line or "was killed by SIGKILL" in line
    others = [status for i, status in enumerate(program.exit_statuses) if i != killed]
    assert others == [1] * (ranks - 1)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_signal_is_known_until_the_parent_asks() -> None:
    programs = [subprocess.Popen(["sleep", "600"]) for _ in range(3)]
    peers = Peers({rank: program.pid for rank, program in enumerate(programs)})
    programs[0].send_signal(signal.SIGKILL)
    programs[2].send_signal(signal.SIGSEGV)
    end = time.monotonic() + 180
    while len(peers.signals) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    programs[1].kill()
    for program in programs:
        program.wait()
    assert peers.describe(0) == "was killed by SIGKILL"
    assert peers.describe(2) == "was killed by SIGSEGV"


def test_a_signal_without_a_name_is_told_by_its_number() -> None:
    assert signal_name(signal.SIGKILL) == "SIGKILL"
    assert signal_name(signal.SIGRTMIN + 3) == f"signal {signal.SIGRTMIN + 3}"
