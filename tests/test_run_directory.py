"""A run directory has one owner, whoever opens, renames or inherits it at the same moment."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from trainer.config.run_sections import RunConfig
from trainer.errors import ConfigError
from trainer.storage.files import is_locked, lock_directory
from trainer.storage.run_directory import RunDirectory, sees_token


def with_an_earlier_run(directory: Path) -> RunConfig:
    (directory / "r").mkdir()
    (directory / "r" / "metrics.jsonl").touch()
    return RunConfig(name="r", dir=str(directory))


def test_what_is_moved_aside_cannot_be_locked_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = with_an_earlier_run(tmp_path)
    locks_of_others = []
    rename = Path.rename

    def rename_with_another_at_the_door(path: Path, target: Path) -> Path:
        locks_of_others.append(lock_directory(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_with_another_at_the_door)
    run = RunDirectory(section)
    assert locks_of_others == [None]
    assert is_locked(run.path)
    assert run.moved_to is not None
    assert not is_locked(run.moved_to)
    run.close()


def test_a_lock_is_of_the_directory_at_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process renames the directory and makes a new one, between opening the lock file and locking it."""
    path = tmp_path / "r"
    path.mkdir()
    flock = fcntl.flock
    others: list[Any] = []

    def flock_after_a_rename(file: Any, operation: int) -> None:
        if not others:
            path.rename(tmp_path / "r.1")
            path.mkdir()
            others.append(None)
            others.append(lock_directory(path))
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock_after_a_rename)
    assert lock_directory(path) is None
    assert others[1] is not None
    others[1].close()


def test_a_start_that_is_refused_leaves_the_owners_token(tmp_path: Path) -> None:
    section = RunConfig(name="r", dir=str(tmp_path))
    run = RunDirectory(section)
    with pytest.raises(ConfigError, match="another process is training"):
        RunDirectory(section)
    assert sees_token(run.path, run.token)
    run.close()


def test_a_forked_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    run = RunDirectory(RunConfig(name="r", dir=str(tmp_path)))
    forked, has_forked = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(has_forked, b"!")
        time.sleep(600)
        os._exit(0)
    try:
        assert is_locked(run.path)
        os.read(forked, 1)
        run.close()
        assert not is_locked(run.path)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
