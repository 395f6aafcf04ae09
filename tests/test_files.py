"""Files and directories are complete or absent, and a directory has one lock."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.full_disk import room_for
from trainer.process.exit import report_error
from trainer.reporting.jsonl import MetricsFile
from trainer.storage.files import (
    is_locked,
    lock_directory,
    make_file,
    make_folder,
    new_directory,
    new_file,
    write_json,
    write_text,
)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_file_is_replaced_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with new_file(path) as partial:
        assert partial.suffix == path.suffix  # by which libraries choose a format
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    write_json(path, {"a": 1})
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert names(tmp_path) == ["a.txt"]


def test_a_file_whose_writing_fails_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="odd"), new_file(path) as partial:
        partial.write_text("half")
        raise RuntimeError("odd")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_directory_is_replaced_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for name in ("old", "new"):
        with new_directory(path) as partial:
            (partial / name).touch()
    assert names(path) == ["new"]
    with pytest.raises(RuntimeError, match="odd"), new_directory(path) as partial:
        (partial / "half").touch()
        raise RuntimeError("odd")
    assert names(path) == ["new"]
    assert names(tmp_path) == ["a"]


def test_the_rest_of_a_killed_process_is_no_obstacle(tmp_path: Path) -> None:
    with new_directory(tmp_path / "a") as partial:
        pass
    partial.mkdir()
    (partial / "half").touch()
    with new_directory(tmp_path / "a") as partial:
        (partial / "whole").touch()
    assert names(tmp_path / "a") == ["whole"]


def test_one_process_has_the_lock(tmp_path: Path) -> None:
    assert not is_locked(tmp_path)  # there is no lock file yet
    first = lock_directory(tmp_path)
    assert first is not None
    assert is_locked(tmp_path)
    assert lock_directory(tmp_path) is None
    first.close()
    assert not is_locked(tmp_path)
    second = lock_directory(tmp_path)
    assert second is not None
    second.close()


def test_a_directory_that_is_gone_is_not_made_again(tmp_path: Path) -> None:
    """A run's, deleted between two looks at it, when it writes a checkpoint, the best model or predictions."""
    run = tmp_path / "run"
    run.mkdir()
    with new_directory(make_folder(run, "checkpoints") / "step_1"):
        pass
    assert make_folder(run, "predictions/val/clean").is_dir()
    shutil.rmtree(run)
    for path in (run / "checkpoints" / "step_2", run / "best"):
        with pytest.raises(FileNotFoundError), new_directory(path):
            pass
    for name in ("checkpoints", "predictions/val/clean"):
        with pytest.raises(FileNotFoundError):
            make_folder(run, name)
    assert not run.exists()


LONG = "x" * 100_000


def write_in_new_file(path: Path) -> None:
    with new_file(path) as partial, partial.open("w") as file:
        file.write(LONG)


def write_in_new_directory(path: Path) -> None:
    with new_directory(path) as partial:
        (partial / "part").write_text(LONG)


def log_rows(path: Path) -> None:
    metrics = MetricsFile(path)
    try:
        for step in range(1000):
            metrics.log({"step": step, "train/loss": 0.5})
    finally:
        metrics.close()  # which has still to write the row, and names no file


WRITERS = (
    lambda path: write_text(path, LONG),
    lambda path: make_file(path, LONG, private=False),
    write_in_new_file,
    write_in_new_directory,
    log_rows,
)


@pytest.mark.parametrize("write", WRITERS)
def test_a_full_disk_names_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], write: Callable[[Path], None]
) -> None:
    """Python names none where an open file is written to: it was "cannot write a file", or a traceback."""
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(OSError, match="File too large") as caught, room_for(10_000):
        write(path)
    assert report_error(caught.value) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and line.endswith(": File too large")
    assert "metrics.jsonl" in line
