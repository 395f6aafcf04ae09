"""A rank that is killed is named in one sentence by one of the others, also where the ranks' store dies with it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.test_directory_gone import start


@pytest.mark.parametrize(("killed", "ranks"), [(0, 2), (1, 2), (0, 3)])
def test_a_killed_rank_is_named_once(killed: int, ranks: int, tmp_path: Path) -> None:
    program, _ = start(tmp_path, ranks)
    os.kill(program.pids[killed], signal.SIGKILL)
    end = program.wait(60)

    lines = [line for line in end.stderr.splitlines() if line]
    (line,) = lines
    assert line.startswith(f"error: rank {killed} on ")
    assert "ended without an error of its own" in line
    others = [status for i, status in enumerate(program.exit_statuses) if i != killed]
    assert others == [1] * (ranks - 1)
