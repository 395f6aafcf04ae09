"""Whether a config would run here: everything built, one step trained in memory, and nothing written."""

from __future__ import annotations

import math
from time import perf_counter

from trainer.commands.arguments import split, the_config
from trainer.core.fuse_check import choose_fuse
from trainer.errors import LockstepError
from trainer.reporting import summary as report
from trainer.reporting.console import Console
from trainer.storage.run_directory import run_path
from trainer.trainer import Trainer


def main(arguments: list[str]) -> None:
    """Show a run's header and its first step, on any number of processes."""
    given = split(arguments)
    config = the_config(given)
    trainer = Trainer(config)
    console = Console(active=trainer.ranks.is_main)
    with trainer.run.settings():
        trainer.fuse, trainer.fuse_note = choose_fuse(trainer.run)
        console.header(
            report.header(trainer.run, trainer.schedule, trainer.fuse, trainer.fuse_note, run_path(config.run))
        )
        step = trainer.plan.step(0)
        trainer.start()
        start = perf_counter()
        try:
            trainer.train_step(step)
            row = trainer.measure(step)
        finally:
            trainer.end_loading()
    if not math.isfinite(row.get("train/loss", 0.0)):
        raise LockstepError(f"the loss of the first step is {row['train/loss']}; see `python -m trainer explain`")
    seconds = perf_counter() - start
    samples = f"{step.size} sample" + "s" * (step.size > 1)
    values = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name.startswith("train/"))
    console.note(f"this runs: a first step of {samples} in {seconds:.2f} s, {values}")
    trainer.ranks.close()
