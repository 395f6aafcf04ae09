"""A run whose directory is deleted, moved or replaced meanwhile ends with one message, and writes nothing more."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.programs import Program, run_program

SETTINGS = [
    "run.name=run",
    "batch.size=128",
    "batch.micro_size=32",
    "model.width=8",
    "train.epochs=1000",
    "train.log_every=3",
    "train.checkpoint_every=5",
    "wandb.mode=disabled",
    "run.figures=false",
]


def delete(run: Path) -> None:
    run.rename(run.with_name("deleted"))  # at once, whatever the run writes meanwhile
    shutil.rmtree(run.with_name("deleted"))


def move(run: Path) -> None:
    run.rename(run.with_name("elsewhere"))


def replace(run: Path) -> None:
    shutil.copytree(run, run.with_name("copy"))
    delete(run)
    run.with_name("copy").rename(run)


def start(directory: Path, ranks: int) -> tuple[Program, Path]:
    """A run with a checkpoint, and its directory."""
    program = Program(["train.py", *SETTINGS, f"run.dir={directory}"], ranks=ranks)
    run = directory / "run"
    end = time.monotonic() + 240
    while not (run / "checkpoints" / "last").exists() and program.is_running():
        assert time.monotonic() < end
        time.sleep(0.02)
    return program, run


@pytest.mark.parametrize(("disturb", "ranks"), [(delete, 1), (delete, 2), (replace, 2)])
def test_a_run_ends_without_its_directory(
    disturb: Callable[[Path], None], ranks: int, tmp_path: Path
) -> None:
    program, run = start(tmp_path, ranks)
    disturb(run)
    names_before = set(tmp_path.iterdir())
    end = program.wait(180)

    assert end.returncode == 1
    (line,) = [line for line in end.stderr.splitlines() if line]
    assert line.startswith(f"error: {run}, the directory of this run, was ")
    assert set(tmp_path.iterdir()) == names_before


def test_a_run_goes_on_where_its_directory_was_moved_to(tmp_path: Path) -> None:
    program, run = start(tmp_path, 1)
    move(run)
    message = program.wait(180).stderr
    advice = message.partition("(")[2].partition(" goes on")[0].split()
    assert advice[0] == f"run.dir={tmp_path}" and advice[1] == "run.name=elsewhere"
    end = run_program(["train.py", *SETTINGS, "train.epochs=20", *advice])
    assert "resumed after step" in end.stdout, end.stderr
