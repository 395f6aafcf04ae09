"""Stopping and going on, mid-epoch and on other ranks, equals not stopping."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch import Tensor, nn

from tests.distributed.ranks import on_ranks
from tests.distributed.small import (
    Images,
    config,
    conv_net,
    fitted,
    largest_difference,
    state,
)
from tests.programs import Program, run_program
from trainer import ConfigError, Trainer, load
from trainer.core.first_forward import FEW
from trainer.core.metrics import TIMINGS
from trainer.data.datasets import FakeImages
from trainer.exact.plan import Plan
from trainer.reporting.jsonl import read_rows
from trainer.storage import checkpoint

NOT_ROUNDING = (*TIMINGS, "digest")  # what no bound holds for
ROOT = Path(__file__).parents[2]
DIGESTS = ("weights_sha256", "buffers_sha256", "optimizer_sha256")


def net() -> nn.Module:
    """BatchNorm and dropout: buffers, counters and keyed draws must all go on."""
    model = conv_net()
    model.insert(4, nn.Dropout(0.3))
    return model


def run(directory: Path, **changes: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    settings = config(
        directory,
        batch__micro_size=7,
        run__resume="auto",
        optimizer__weight_decay=1e-3,
        train__epochs=3,
        schedule__name="plateau",
        schedule__patience=0,
        **changes,
    )
    trainer = fitted(settings, net(), train_data=Images(103), val_data=Images(50))
    return state(trainer), trainer.optimizer.state_dict()["state"]


def rows(directory: Path) -> list[dict[str, float]]:
    return [
        {k: v for k, v in r.items() if k not in NOT_ROUNDING}
        for r in read_rows(directory / "run" / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def straight(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    directory = tmp_path_factory.mktemp("straight")
    ((weights, optimizer),) = on_ranks(1, run, directory)
    return directory, weights, optimizer


@pytest.mark.parametrize(
    "stops", [[(1, 6), (2, 12)], [(2, 1), (1, 4), (3, 12)], [(3, 7), (1, 8), (2, 12)]]
)
def test_resumed_runs_end_alike(
    tmp_path: Path, straight: Any, stops: list[tuple[int, int]]
) -> None:
    """Runs cut at other steps, each part on another number of ranks: weights, buffers, momenta and every row."""
    directory, weights, optimizer = straight
    for ranks, step in stops:
        results = on_ranks(
            ranks, run, tmp_path, train__max_steps=step, train__log_every=4
        )
    for got, got_optimizer in results:
        assert largest_difference(got, weights) < 1e-12
        for index, expected_state in optimizer.items():
            assert largest_difference(got_optimizer[index], expected_state) < 1e-12
    expected = on_ranks(1, run, tmp_path / "expected", train__log_every=4) and rows(
        tmp_path / "expected"
    )
    assert len(rows(tmp_path)) == len(expected)
    for row, expected_row in zip(rows(tmp_path), expected, strict=True):
        assert row == pytest.approx(expected_row, rel=1e-10)
    best = [
        json.loads((d / "run" / "best" / "metrics.json").read_text())
        for d in (tmp_path, directory)
    ]
    assert best[0]["step"] == best[1]["step"]
    assert best[0]["val/loss"] == pytest.approx(best[1]["val/loss"], rel=1e-10)


def test_a_changed_key_is_refused_by_name(tmp_path: Path) -> None:
    def changed(directory: Path, **changes: Any) -> str:
        try:
            run(directory, **changes)
        except ConfigError as error:
            return str(error)
        return "accepted"

    on_ranks(1, run, tmp_path, train__max_steps=2)
    for message in on_ranks(
        2, changed, tmp_path, train__max_steps=3, optimizer__lr=0.2
    ):
        assert message.startswith("optimizer.lr: ")
        assert "0.1" in message
        assert "run.resume_changes=allow" in message
    changes = {
        "train__max_steps": 3,
        "optimizer__lr": 0.2,
        "run__resume_changes": "allow",
    }
    assert on_ranks(2, changed, tmp_path, **changes) == ["accepted", "accepted"]
    assert on_ranks(
        1, changed, tmp_path, train__max_steps=4, optimizer__lr=0.2, data__workers=1
    ) == ["accepted"]
    written_config = (tmp_path / "run" / "config.yaml").read_bytes()
    (message,) = on_ranks(1, changed, tmp_path, train__max_steps=3, optimizer__lr=0.2)
    assert message.startswith(
        "train.max_steps: the run to resume is at step 4 and would end at 3"
    )
    assert (tmp_path / "run" / "config.yaml").read_bytes() == written_config


def options(directory: Path, steps: int) -> list[str]:
    """The default config, bitwise, `steps` long: 23 steps an epoch, a row every 5, a checkpoint at each epoch's end."""
    fixed = [
        "run.reproducibility=bitwise",
        "run.name=run",
        "run.figures=false",
        "wandb.mode=disabled",
    ]
    return [
        *fixed,
        f"run.dir={directory}",
        f"train.max_steps={steps}",
        "train.epochs=1000",
        "train.log_every=5",
    ]


def last_steps(directory: Path) -> tuple[int, int]:
    """The steps of the last checkpoint and of the last row, or 0 and 0 before there is a checkpoint."""
    last = directory / "run" / "checkpoints" / "last"
    if not last.exists():
        return 0, 0
    return int(last.read_text()[-9:]), int(rows(directory)[-1]["step"])


def kill_between_checkpoints(program: Program, directory: Path) -> tuple[int, int]:
    """SIGKILL to every process of the program 10 to 19 steps past a checkpoint. Returns `last_steps`."""
    deadline = time.monotonic() + 240
    while True:
        saved, logged = last_steps(directory)
        if saved and 10 <= logged - saved < 20:
            break
        assert program.is_running()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    processes = [psutil.Process(pid) for pid in program.pids]
    for rank in list(processes):
        processes += rank.children(recursive=True)
    # Two ranks, each with a loader process for training and one for validation.
    assert len(processes) == 6
    for process in processes:
        process.kill()
    psutil.wait_procs(processes, timeout=60)
    return last_steps(directory)


def test_a_run_killed_between_checkpoints_is_done_over_to_the_same_bits(
    tmp_path: Path,
) -> None:
    """SIGKILL to two ranks and their loader processes; one process goes on, and one never stopped."""

    def straight_through(steps: int) -> dict[str, Any]:
        return Trainer(
            load(
                ROOT / "configs" / "digits.yaml", options(tmp_path / "straight", steps)
            )
        ).fit()

    program = Program(
        ["train.py", *options(tmp_path / "cut", 20_000), "data.workers=1"], ranks=2
    )
    try:
        saved, logged = kill_between_checkpoints(program, tmp_path / "cut")
    finally:
        program.kill()
    assert saved < logged
    # Past the rows that the killed run had written after its checkpoint.
    end = logged + 9
    result = run_program(
        ["train.py", *options(tmp_path / "cut", end), "run.resume=auto"]
    )
    assert result.returncode == 0, result.stderr
    assert f"resumed after step {saved}" in result.stdout
    (reference,) = on_ranks(1, straight_through, end)
    summary = json.loads((tmp_path / "cut" / "run" / "summary.json").read_text())
    assert {name: summary[name] for name in DIGESTS} == {
        name: reference[name] for name in DIGESTS
    }
    assert rows(tmp_path / "cut") == rows(tmp_path / "straight")


class Noted(FakeImages):
    """100,000 images that note in a file for each rank which of them are read, whichever process reads them."""

    def __init__(self, train: bool, log: str) -> None:
        super().__init__(
            "train" if train else "val", 100_000 if train else 8, (3, 8, 8), 10
        )
        self.log = (
            Path(f"{log}{os.environ.get('RANK', '0')}") if train else Path(os.devnull)
        )

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with self.log.open("a") as file:
            file.write(f"{index}\n")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_reads_nothing_before_its_place(
    tmp_path: Path, workers: int
) -> None:
    """At the last of an epoch's 1000 steps, each of two ranks reads its half of that step's samples, and no other.

    Only the first forward, which tries model, loss and data together, is one of the run's first samples.
    The proof reads some of them more than once.
    """

    def go_on(until: int) -> None:
        settings = config(
            tmp_path,
            run__resume="auto",
            data__name=f"{__name__}.Noted",
            data__log=str(tmp_path / "read"),
            data__workers=workers,
            batch__size=100,
            batch__micro_size=50,
            model__num_classes=10,
            train__epochs=1,
            train__max_steps=until,
        )
        Trainer(settings).fit()

    on_ranks(1, go_on, 1)
    checkpoints = tmp_path / "run" / "checkpoints"
    first = checkpoint.load(checkpoints / "step_00000001")
    # As after 998 steps more.
    first.progress.step, first.progress.samples_seen = 999, 99_900
    checkpoint.write(checkpoints, checkpoint.take(first), keep=1)
    (tmp_path / "read0").unlink()
    on_ranks(2, go_on, 1000)
    order = Plan(100_000, 100, 50, 2, 1, seed=0).permutation(0)
    for rank in (0, 1):
        shape_sample, *sample_ids = map(
            int, (tmp_path / f"read{rank}").read_text().split()
        )
        assert shape_sample == 0  # the model is made for a sample's shape
        assert sample_ids[:FEW] == order[:FEW].tolist()  # those of the first forward
        # What a sample takes in shared memory is told by the first one, again.
        expected = set(order[99_900:][50 * rank :][:50].tolist())
        assert set(sample_ids[FEW:]) - {0} == expected
