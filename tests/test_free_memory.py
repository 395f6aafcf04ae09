"""Main memory that a process may still use: the machine's, within a container's limit."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from trainer.process import free_memory
from trainer.process.free_memory import share_of_main_memory

MIB = 2**20


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(str(100 * MIB), 70 * MIB), ("max", 400 * MIB), ("", 400 * MIB)],
)
def test_files_that_a_container_keeps_in_memory_count_as_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, expected: int
) -> None:
    if limit:  # else a machine without control groups
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{90 * MIB}\n")
        (tmp_path / "memory.stat").write_text(
            f"anon {20 * MIB}\nactive_file {10 * MIB}\ninactive_file {60 * MIB}\n"
        )
    machine = psutil.virtual_memory()._replace(available=400 * MIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    monkeypatch.setattr(free_memory, "CGROUP", tmp_path)
    assert free_memory.free_memory(torch.device("cpu")) == expected
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    assert share_of_main_memory() == expected // 10
