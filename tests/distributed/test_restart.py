"""A rank that dies, restarted by torchrun: the run ends as the undisturbed one does."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.programs import run_program

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, signal, sys
from trainer.commands.train import main
from trainer.process.exit import exit_process
from trainer.trainer import Trainer

train_step = Trainer.train_step

def train_step_and_die(self, step):
    train_step(self, step)
    is_first_attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
    if is_first_attempt and step.number == 15:
        self.finish_saving()
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

Trainer.train_step = train_step_and_die
exit_process(main(sys.argv[1:]))
"""
ARGUMENTS = [
    "run.resume=auto",
    "train.max_steps=30",
    "train.checkpoint_every=10",
    "run.figures=false",
]
ARGUMENTS += [
    "wandb.mode=disabled",
    # No import of scikit-learn in each of the processes.
    "data.name=fake",
    "data.size=1280",
    "data.val_size=64",
    "data.image_size=8",
    "data.num_classes=10",
    "run.reproducibility=bitwise",
    "batch.micro_size=16",
]


def weights(directory: Path) -> str:
    return str(
        json.loads((directory / "digits" / "summary.json").read_text())[
            "weights_sha256"
        ]
    )


@pytest.mark.fresh_process  # torchrun starts the ranks, and starts them again
def test_a_rank_that_dies_is_restarted_and_changes_nothing(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    undisturbed = ["train.py", *ARGUMENTS, f"run.dir={tmp_path / 'undisturbed'}"]
    assert run_program(undisturbed).returncode == 0
    torchrun = [
        "-m",
        "torch.distributed.run",  # forked itself; the ranks are fresh
        "--standalone",
        "--max-restarts",
        "1",
    ]
    disturbed = [
        *torchrun,
        "--nproc_per_node",
        "2",
        str(program),
        *ARGUMENTS,
        f"run.dir={tmp_path / 'disturbed'}",
    ]
    result = run_program(disturbed, env=environment, timeout=180)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "resumed after step 10" in result.stdout
    assert weights(tmp_path / "disturbed") == weights(tmp_path / "undisturbed")
