"""Lockstep. As used: all defaults, in a terminal where the console draws its bar. Lean: no row is logged."""

from __future__ import annotations

import io
from contextlib import redirect_stdout

import torch

from benchmarks.peers.job import SEED, SGD, Job
from trainer import Config, Step, Trainer
from trainer.process.memory import keep_freed_memory

PACKAGES = ("torch",)


def train(job: Job) -> None:
    class InTurns(Trainer):
        def train_step(self, step: Step) -> None:
            super().train_step(step)
            job.step_done(self.module)

    workload = job.workload
    settings = {
        "run": {"dir": str(job.directory), "seed": SEED, "figures": False},
        "batch": {"size": workload.batch_size, "micro_size": workload.micro_size},
        "optimizer": {"name": "sgd", **SGD},
        "schedule": {"name": "constant"},
        "train": {"epochs": 1},
        "best": {"metric": "train/loss"},
        "wandb": {"mode": "disabled"},
    }
    if not job.as_used:
        settings["train"]["log_every"] = 2 * job.total_steps  # type: ignore[index]
    keep_freed_memory("cpu")  # as `train.py` does
    with redirect_stdout(Terminal()):
        trainer = InTurns(
            Config.from_dict(settings),
            model=workload.make_model(),
            train_data=job.data,
        )
        torch.set_num_threads(1)
        trainer.fit()


class Terminal(io.StringIO):
    """A terminal that nobody reads."""

    def isatty(self) -> bool:
        return True
