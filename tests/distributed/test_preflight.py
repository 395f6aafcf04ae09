"""Before a run on several processes: ranks that differ in what the run promises to share are refused by name."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import on_ranks
from tests.distributed.small import Images, Points, config, conv_net, fitted, mlp
from trainer import ConfigError, Trainer
from trainer.core import preflight
from trainer.core.preflight import check_ranks, notes_on
from trainer.data.datasets import FakeImages
from trainer.process.ranks import Ranks
from trainer.storage.fingerprint import quick_fingerprint

HOST = socket.gethostname()


def pretend(rank: int, **facts: Any) -> None:
    """Have one rank read other facts of its machine."""
    read = preflight.describe_rank

    def describe(*args: Any) -> dict[str, Any]:
        values = read(*args)
        if os.environ.get("RANK") == str(rank):
            values |= facts
        return values

    preflight.describe_rank = describe


def failure(
    directory: Path, rank: int, reproducibility: str, **facts: Any
) -> tuple[str, str]:
    pretend(rank, **facts)
    try:
        fitted(
            config(
                directory, run__reproducibility=reproducibility, batch__micro_size=14
            ),
            mlp(),
            train_data=Points(56, ignored=False),
            val_data=Points(28, ignored=False),
        )
    except Exception as error:
        return type(error).__name__, str(error)
    return "", "nothing failed"


@pytest.mark.parametrize(
    ("rank", "reproducibility", "facts", "message"),
    [
        (
            1,
            "standard",
            {"torch": "2.0.0", "host": "node7"},
            "torch is 2.0.0 on rank 1 (node7) and ",
        ),
        (
            1,
            "standard",
            {"numpy": "1.20.0"},
            f"numpy is 1.20.0 on rank 1 ({HOST}) and ",
        ),
        (
            0,
            "standard",
            {"nccl": "2.27.7"},
            f"nccl is None on rank 1 ({HOST}) and 2.27.7 on rank 0 ({HOST})",
        ),
        (
            1,
            "bitwise",
            {"instructions": "AVX2!"},
            f"instructions is AVX2! on rank 1 ({HOST}) and ",
        ),
        (
            1,
            "bitwise",
            {"device": "NVIDIA T4"},
            f"device is NVIDIA T4 on rank 1 ({HOST}) and cpu on rank 0 ({HOST})",
        ),
    ],
)
def test_a_difference_that_breaks_the_promise_is_one_message(
    tmp_path: Path, rank: int, reproducibility: str, facts: dict[str, Any], message: str
) -> None:
    first, second = on_ranks(2, failure, tmp_path, rank, reproducibility, **facts)
    assert first == second
    assert first[0] == "LockstepError"
    assert first[1].startswith(message)
    assert not any(tmp_path.iterdir()), (
        "nothing is written before the ranks are known to be alike"
    )


def test_other_differences_are_in_the_environment(tmp_path: Path) -> None:
    facts = {
        "device": "NVIDIA T4",
        "python": "3.9.1",
        "driver": "570.1",
        "clock": time.time() - 60,
        "host": "node7",
    }
    for kind, message in on_ranks(2, failure, tmp_path, 1, "standard", **facts):
        assert (kind, message) == ("", "nothing failed")
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert {
        "python",
        "torch",
        "device",
        "processes",
        "threads",
        "code",
        "data",
    } <= environment.keys()
    first, second = environment["ranks"]
    assert (first["rank"], first["host"], first["device"], first["clock_skew"]) == (
        0,
        HOST,
        "cpu",
        0,
    )
    assert (second["rank"], second["host"], second["device"]) == (
        1,
        "node7",
        "NVIDIA T4",
    )
    assert second["clock_skew"] == pytest.approx(-60, abs=10)
    assert first["torch"] == second["torch"] == environment["torch"]
    assert first["shares_run_directory"] and second["shares_run_directory"]
    notes = notes_on(environment["ranks"])
    assert any(
        note.startswith(
            "the ranks differ in device: NVIDIA T4 on rank 1 (node7), cpu on rank 0"
        )
        for note in notes
    )
    assert any(note.startswith("the clock of rank 1 (node7) is -") for note in notes)
    assert len(notes) == 4


def test_one_process_is_described_too(tmp_path: Path) -> None:
    on_ranks(1, failure, tmp_path, 9, "standard")
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    (only,) = environment["ranks"]
    assert only["rank"] == 0
    assert notes_on([only]) == []


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"optimizer__lr": 0.2}, "optimizer.lr"),
        ({"run__seed": 5}, "run.seed"),
        ({}, ""),
    ],
)
def test_other_configs_are_refused(
    tmp_path: Path, changes: dict[str, Any], key: str
) -> None:
    def run() -> str:
        own = changes if os.environ["RANK"] == "1" else {}
        directory = tmp_path / os.environ["RANK"]  # each rank may have its own
        try:
            Trainer(
                config(directory, batch__micro_size=14, **own),
                model=conv_net(),
                train_data=Images(56),
            )
        except ConfigError as error:
            return str(error)
        return ""

    first, second = on_ranks(2, run)
    assert first == second
    if key:
        assert first.startswith(
            f"{key}: is {next(iter(changes.values()))} on rank 1 ({HOST}) and "
        )
    else:
        assert not first


def test_the_preflight_takes_milliseconds(tmp_path: Path) -> None:
    def seconds() -> float:
        ranks = Ranks("fp32")
        settings = config(tmp_path)
        durations = []
        for _ in range(20):
            ranks.barrier()
            started = time.perf_counter()
            check_ranks(settings, ranks)
            durations.append(time.perf_counter() - started)
        return min(durations)

    assert max(on_ranks(2, seconds)) < 0.05


@pytest.mark.parametrize(
    "make", [lambda n: FakeImages("train", n, (1, 4, 4), 4), Points]
)
def test_a_quick_fingerprint_tells_data_apart(make: Callable[[int], Any]) -> None:
    assert quick_fingerprint(make(1000)) == quick_fingerprint(make(1000))
    assert quick_fingerprint(make(1000)) != quick_fingerprint(make(1001))
