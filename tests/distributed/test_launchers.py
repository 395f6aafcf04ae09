"""The commands users type, as they type them: every launcher does the same run, and stops cleanly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.distributed.small import largest_difference
from trainer.core.metrics import TIMINGS
from trainer.reporting.jsonl import read_rows

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
LAUNCHERS = {
    "python": [sys.executable],
    "accelerate": [str(BIN / "accelerate"), "launch", "--config_file", "launch/cpu.yaml"],
    "torchrun": [str(BIN / "torchrun"), "--nproc_per_node", "3", "--master_port", "0"],
}
SHORT = ["train.epochs=3", "train.max_steps=40", "train.precision=fp64", "run.figures=false", "wandb.mode=disabled"]


def command(launcher: str, *arguments: str) -> list[str]:
    if launcher == "torchrun":
        return [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "3", *arguments]
    return [*LAUNCHERS[launcher], *arguments]


def run(launcher: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(launcher, *arguments), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def summary(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "digits" / "summary.json").read_text()))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The default config, fp64 and cut short inside its second epoch, by each launcher."""
    directories = {launcher: tmp_path_factory.mktemp(launcher) for launcher in LAUNCHERS}
    for launcher, directory in directories.items():
        run(launcher, "train.py", f"run.dir={directory}", *SHORT)
    return directories


def test_each_launcher_starts_the_processes_it_should(runs: dict[str, Path]) -> None:
    assert {launcher: summary(directory)["world_size"] for launcher, directory in runs.items()} == {
        "python": 1,
        "accelerate": 2,
        "torchrun": 3,
    }


def test_the_run_is_the_same(runs: dict[str, Path]) -> None:
    def last(directory: Path) -> dict[str, Any]:
        return load_file(directory / "digits" / "checkpoints" / "step_00000040" / "model.safetensors")

    reference = runs["python"]
    for launcher in ("accelerate", "torchrun"):
        assert largest_difference(last(runs[launcher]), last(reference)) < 1e-12
        for row, due in zip(
            read_rows(runs[launcher] / "digits" / "metrics.jsonl"),
            read_rows(reference / "digits" / "metrics.jsonl"),
            strict=True,
        ):
            for column in (*TIMINGS, "digest"):  # no bound holds for these
                row.pop(column, None)
                due.pop(column, None)
            assert row == pytest.approx(due, rel=1e-10)


def test_the_best_model_gives_its_numbers_again(runs: dict[str, Path]) -> None:
    kept = json.loads((runs["python"] / "digits" / "best" / "metrics.json").read_text())
    for launcher in ("python", "torchrun"):
        printed = run(launcher, "-m", "trainer", "evaluate", str(runs["python"] / "digits")).stdout
        values = {line.split()[0]: float(line.split()[1]) for line in printed.splitlines() if line.startswith("  val/")}
        assert values == {name: pytest.approx(kept[name], abs=1e-6) for name in ("val/loss", "val/accuracy")}


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (["optimizer.momentun=0.9"], 'optimizer.momentun: SGD has no such argument; did you mean "momentum"?'),
        (["data.name=folder", "data.root=no/such/folder"], "data.root"),
        (["batch.size=2", "batch.micro_size=2"], "3 processes share 1 micro-batches"),
    ],
)
def test_a_mistake_is_told_once(tmp_path: Path, launcher: str, mistake: list[str], message: str) -> None:
    if "batch.size=2" in mistake and launcher != "torchrun":
        pytest.skip("no mistake on fewer processes")
    done = run(launcher, "train.py", f"run.dir={tmp_path}", *SHORT, *mistake, check=False)
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert message in told[0]
    assert "trainer/trainer.py" not in done.stderr  # no traceback of ours
    assert not (tmp_path / "digits").exists()
    assert done.returncode == (2 if launcher == "python" else 1)  # launchers have a status of their own


@pytest.mark.parametrize(
    ("launcher", "number"), [("python", signal.SIGTERM), ("python", signal.SIGINT), ("torchrun", signal.SIGTERM)]
)
def test_a_signal_ends_a_run_at_a_step_with_a_checkpoint(tmp_path: Path, launcher: str, number: int) -> None:
    arguments = [
        "train.py",
        f"run.dir={tmp_path}",
        *SHORT,
        "train.max_steps=null",
        "train.epochs=1000",
        "train.log_every=5",
        "data.workers=1",
    ]
    process = subprocess.Popen(
        command(launcher, *arguments), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    rows = tmp_path / "digits" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (rows.exists() and rows.read_text().count("\n") > 3):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    stderr = process.communicate(timeout=60)[1]
    if launcher == "python":
        assert process.returncode == 128 + number
    assert stderr.count("a checkpoint is kept") == 1
    assert "trainer/trainer.py" not in stderr
    assert launcher != "python" or "Traceback" not in stderr
    last = tmp_path / "digits" / "checkpoints" / (tmp_path / "digits" / "checkpoints" / "last").read_text().strip()
    step = json.loads((last / "manifest.json").read_text())["step"]
    assert f"after step {step}" in stderr
    run(
        "python",
        "train.py",
        f"run.dir={tmp_path}",
        *SHORT,
        f"train.max_steps={step + 3}",
        "train.epochs=1000",
        "run.resume=auto",
    )
    assert summary(tmp_path)["steps"] == step + 3


def test_a_launcher_that_asks_for_more_than_the_config_is_refused(tmp_path: Path) -> None:
    environment = {**os.environ, "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, "train.py", f"run.dir={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "set train.precision instead" in done.stderr
