"""`check`: a run's header and first step, and nothing left behind."""

from __future__ import annotations

from pathlib import Path
from subprocess import CompletedProcess

from tests.programs import run_program

ROOT = Path(__file__).parents[1]


def check(
    directory: Path, *arguments: str, processes: int = 1
) -> CompletedProcess[str]:
    command = [
        "-m",
        "trainer",
        "check",
        ROOT / "configs/digits.yaml",
        *arguments,
        f"run.dir={directory}",
    ]
    return run_program(command, ranks=processes)


def test_it_shows_the_first_step_once_and_writes_nothing(tmp_path: Path) -> None:
    done = check(tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("64 = 8 × 8 on 2 processes: 4+4") == 1
    assert done.stdout.count("this runs: a first step of 64 samples") == 1
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_no_number_is_an_error(tmp_path: Path) -> None:
    exploded = check(
        tmp_path, "train.precision=fp16", "data.mean=[1e-30]", "data.std=[1e-30]"
    )
    assert exploded.returncode == 1
    assert "the loss is not finite from step 1" in exploded.stderr


def test_a_gradient_that_is_no_number_is_an_error(tmp_path: Path) -> None:
    broken = check(
        tmp_path, "loss.name=tests.unruly.InfiniteGradient", "best.metric=val/loss"
    )
    assert broken.returncode == 1
    assert "the gradient is not finite from step 1" in broken.stderr
    assert "Traceback" not in broken.stderr
