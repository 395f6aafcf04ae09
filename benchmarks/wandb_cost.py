"""What W&B costs a run's pace: steps per second without it, offline, and online before a loopback server.

python -m benchmarks.wandb_cost                         about three minutes
python -m benchmarks.wandb_cost --rounds 3 --epochs 2

Whole runs of configs/digits.yaml, each in a process of its own, in turn; a run's pace is the median over its
`samples_per_second`, which leaves out start, evaluation and end, and what is compared are medians over the rounds.
The server is a stand-in on this machine: it takes CPU time that a real one would not.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.wandb_server import WandbServer
from trainer import load
from trainer.reporting.jsonl import read_rows

MODES = ("disabled", "offline", "online")


def pace(mode: str, epochs: int, directory: Path, environment: dict[str, str]) -> float:
    """Steps per second of one run."""
    keys = [
        f"run.dir={directory}",
        f"run.name={mode}",
        "run.figures=false",
        f"wandb.mode={mode}",
    ]
    command = [sys.executable, "train.py", *keys, f"train.epochs={epochs}"]
    subprocess.run(
        command, env=os.environ | environment, check=True, capture_output=True
    )
    rows = read_rows(directory / mode / "metrics.jsonl")
    size = load(Path("configs/digits.yaml"), []).batch.size
    return (
        float(
            statistics.median(
                row["samples_per_second"] for row in rows if "samples_per_second" in row
            )
        )
        / size
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wandb_cost")
    parser.add_argument(
        "--rounds", type=int, default=5, help="runs of each mode (default: 5)"
    )
    parser.add_argument(
        "--epochs", type=int, default=15, help="epochs of a run (default: 15)"
    )
    options = parser.parse_args()
    found: dict[str, list[float]] = {mode: [] for mode in MODES}
    with TemporaryDirectory() as directory, WandbServer() as server:
        home = {"HOME": directory, "WANDB_ERROR_REPORTING": "false"}
        for number in range(options.rounds):
            for mode in MODES[:: -1 if number % 2 else 1]:
                found[mode].append(
                    pace(
                        mode, options.epochs, Path(directory), home | server.environment
                    )
                )
    print("| W&B | steps/s | × disabled |\n|---|--:|--:|")
    for mode, paces in found.items():
        ratios = [
            one / base for one, base in zip(paces, found["disabled"], strict=True)
        ]
        print(
            f"| {mode} | {statistics.median(paces):.1f} | {statistics.median(ratios):.3f} |"
        )


if __name__ == "__main__":
    main()
