"""The commands users type, as they type them: every launcher does the same run, and stops cleanly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.distributed.small import largest_difference
from tests.programs import Program, run_program
from trainer.core.metrics import TIMINGS
from trainer.reporting.jsonl import read_rows

ROOT = Path(__file__).parents[2]
# What the commands `accelerate` and `torchrun` run. A launcher itself is forked; the ranks it starts are fresh.
# Each of those uses the CPU for 5 s before its first step, so there are no more of them than needed.
ACCELERATE_CLI = ["-m", "accelerate.commands.accelerate_cli"]
ACCELERATE = [*ACCELERATE_CLI, "launch", "--config_file", "launch/cpu.yaml"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
SHORT = [
    "train.epochs=3",
    "train.max_steps=40",
    "train.precision=fp64",
    "run.figures=false",
    "wandb.mode=disabled",
]
ENDLESS = [
    *SHORT,
    "train.max_steps=null",
    "train.epochs=1000",
    "train.log_every=5",
    "data.workers=1",
]


def summary(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "digits" / "summary.json").read_text()))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The default config, fp64 and cut short inside its second epoch, with a launcher and without."""
    directories = {}
    for name, launcher in (("python", []), ("accelerate", ACCELERATE)):
        directory = directories[name] = tmp_path_factory.mktemp(name)
        result = run_program([*launcher, "train.py", f"run.dir={directory}", *SHORT])
        assert result.returncode == 0, result.stdout + result.stderr
    return directories


def check_same_run(directory: Path, reference: Path) -> None:
    """What launchers set in the environment must not change a run: its last checkpoint, and every row."""

    def last(directory: Path) -> dict[str, Any]:
        checkpoints = directory / "digits" / "checkpoints"
        name = (checkpoints / "last").read_text().strip()
        return load_file(checkpoints / name / "model.safetensors")

    assert largest_difference(last(directory), last(reference)) < 1e-12
    rows = read_rows(directory / "digits" / "metrics.jsonl")
    references = read_rows(reference / "digits" / "metrics.jsonl")
    assert len(rows) > 3
    # A run that a signal stops leaves the evaluation of its last step to a resume.
    for row, expected in zip(rows, references[: len(rows)], strict=True):
        for column in (*TIMINGS, "digest"):  # no bound holds for these
            row.pop(column, None)
            expected.pop(column, None)
        assert row == pytest.approx(expected, rel=1e-10)


@pytest.mark.fresh_process  # how many processes a launcher starts, and whether they join
def test_accelerate_starts_the_processes_it_should_and_the_run_is_the_same(
    runs: dict[str, Path],
) -> None:
    worlds = [summary(runs[name])["world_size"] for name in ("python", "accelerate")]
    assert worlds == [1, 2]
    check_same_run(runs["accelerate"], runs["python"])


def test_the_best_model_gives_its_numbers_again(runs: dict[str, Path]) -> None:
    best = json.loads((runs["python"] / "digits" / "best" / "metrics.json").read_text())
    for ranks in (1, 3):
        result = run_program(
            ["-m", "trainer", "evaluate", runs["python"] / "digits"], ranks=ranks
        )
        assert result.returncode == 0, result.stderr
        values = {}
        for line in result.stdout.splitlines():
            if line.startswith("  val/"):
                name, value, *_ = line.split()
                values[name] = float(value)
        assert values == {
            name: pytest.approx(best[name], abs=1e-6)
            for name in ("val/loss", "val/accuracy")
        }


MISSPELT = ["optimizer.momentun=0.9"]
MOMENTUM = 'optimizer.momentun: SGD has no such argument; did you mean "momentum"?'
MISTAKES = [
    (1, MISSPELT, MOMENTUM),
    (2, MISSPELT, MOMENTUM),
    (3, MISSPELT, MOMENTUM),
    (1, ["data.name=folder", "data.root=no/such/folder"], "data.root"),
    (2, ["data.name=folder", "data.root=no/such/folder"], "data.root"),
    (3, ["data.name=folder", "data.root=no/such/folder"], "data.root"),
    (3, ["batch.size=2", "batch.micro_size=2"], "3 processes share 1 micro-batches"),
]


def check_one_message(
    result: subprocess.CompletedProcess[str], message: str, directory: Path
) -> None:
    """The mistake is reported by one rank, before anything is written and without a traceback through the trainer."""
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "trainer/trainer.py" not in result.stderr
    assert not (directory / "digits").exists()


@pytest.mark.parametrize(("ranks", "mistake", "message"), MISTAKES)
def test_a_mistake_is_reported_once(
    tmp_path: Path, ranks: int, mistake: list[str], message: str
) -> None:
    result = run_program(
        ["train.py", f"run.dir={tmp_path}", *SHORT, *mistake], ranks=ranks
    )
    check_one_message(result, message, tmp_path)
    assert result.returncode == 2


@pytest.mark.fresh_process  # launchers print tracebacks and have a status of their own
@pytest.mark.parametrize(
    ("launcher", "mistake", "message"),
    [
        # Found before anything heavy is imported.
        (ACCELERATE, ["optimizr.lr=1"], 'did you mean "optimizer"?'),
        # Found when the ranks have joined.
        (TORCHRUN, MISSPELT, MOMENTUM),
    ],
)
def test_a_mistake_is_reported_once_under_a_launcher(
    tmp_path: Path, launcher: list[str], mistake: list[str], message: str
) -> None:
    result = run_program(
        [*launcher, "train.py", f"run.dir={tmp_path}", *SHORT, *mistake]
    )
    check_one_message(result, message, tmp_path)
    assert result.returncode == 1


def wait_for_rows(directory: Path, is_running: Callable[[], bool]) -> None:
    """Until the run has logged more than three rows. It must still run then."""
    rows = directory / "digits" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (rows.exists() and rows.read_text().count("\n") > 3):
        assert time.monotonic() < deadline
        assert is_running()
        time.sleep(0.05)


def step_of_stop(directory: Path) -> int:
    checkpoints = directory / "digits" / "checkpoints"
    last = checkpoints / (checkpoints / "last").read_text().strip()
    return int(json.loads((last / "manifest.json").read_text())["step"])


def check_checkpoint_of_stop(directory: Path, stderr: str) -> None:
    """The message is printed once and names the checkpoint's step, and the run resumes from there."""
    assert stderr.count("a checkpoint is kept") == 1, stderr
    assert "trainer/trainer.py" not in stderr
    step = step_of_stop(directory)
    assert f"after step {step}" in stderr
    length = [f"train.max_steps={step + 3}", "train.epochs=1000", "run.resume=auto"]
    result = run_program(["train.py", f"run.dir={directory}", *SHORT, *length])
    assert result.returncode == 0, result.stderr
    assert summary(directory)["steps"] == step + 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_at_a_step_with_a_checkpoint(
    tmp_path: Path, number: int
) -> None:
    program = Program(["train.py", f"run.dir={tmp_path}", *ENDLESS])
    try:
        wait_for_rows(tmp_path, program.is_running)
        program.send_signal(number)
        result = program.wait(timeout=180)
    finally:
        program.kill()
    assert result.returncode == 128 + number
    assert "Traceback" not in result.stderr
    check_checkpoint_of_stop(tmp_path, result.stderr)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    tmp_path: Path, rank: int
) -> None:
    program = Program(["train.py", f"run.dir={tmp_path}", *ENDLESS], ranks=2)
    try:
        wait_for_rows(tmp_path, program.is_running)
        os.kill(program.pids[rank], signal.SIGTERM)
        deadline = time.monotonic() + 180
        # `wait` would signal the other rank, as launchers do.
        while program.is_running():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        result = program.wait(timeout=1)
    finally:
        program.kill()
    assert program.exit_statuses == [143, 143]
    check_checkpoint_of_stop(tmp_path, result.stderr)


@pytest.mark.fresh_process  # the launcher is signalled, and has to pass it on
def test_a_signal_to_a_launcher_ends_the_run_at_a_step_with_a_checkpoint(
    tmp_path: Path,
) -> None:
    """Until then, it is the run that one process does without a launcher."""
    directory, reference = tmp_path / "torchrun", tmp_path / "python"
    program = Program([*TORCHRUN, "train.py", f"run.dir={directory}", *ENDLESS])
    try:
        wait_for_rows(directory, program.is_running)
        program.send_signal(signal.SIGTERM)
        stderr = program.wait(timeout=240).stderr
    finally:
        program.kill()
    environment = json.loads((directory / "digits" / "environment.json").read_text())
    assert len(environment["ranks"]) == 2
    stop = f"train.stop_after={step_of_stop(directory)}"
    alone = run_program(["train.py", f"run.dir={reference}", *ENDLESS, stop])
    assert alone.returncode == 0, alone.stderr
    check_same_run(directory, reference)
    check_checkpoint_of_stop(directory, stderr)


def test_a_launcher_that_asks_for_more_than_the_config_is_refused(
    tmp_path: Path,
) -> None:
    environment = {
        **os.environ,
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_USE_CPU": "true",
    }
    result = run_program(
        ["train.py", f"run.dir={tmp_path}"], env=environment, timeout=60
    )
    assert result.returncode == 2
    assert "set train.precision instead" in result.stderr
