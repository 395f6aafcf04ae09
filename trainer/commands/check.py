"""See whether a config would run here: its header and its first step, in memory.

lockstep check configs/cifar10.yaml batch.size=256
torchrun --nproc_per_node 2 -m trainer check configs/cifar10.yaml

Everything is built as for training, the promise is tried on more samples than a run tries (`run.proof`), and one step
is trained. Nothing is written.
"""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

from trainer.commands.arguments import CommandParser, load_config
from trainer.process.memory import keep_freed_memory

if TYPE_CHECKING:
    from trainer.core.metrics import Row
    from trainer.trainer import Trainer


def main(arguments: list[str]) -> None:
    """Print a run's header and what its first step gave, on any number of processes."""
    parser = CommandParser("check", __doc__)
    parser.add_config()
    config = load_config(parser.parse(arguments))

    from trainer.core.refused import refused_operations
    from trainer.core.try_out import explained
    from trainer.reporting.console import Console
    from trainer.reporting.summary import header
    from trainer.reporting.trackers.group import build_trackers
    from trainer.storage.run_directory import run_path
    from trainer.trainer import Trainer

    trainer = Trainer(config)
    # Whether their packages are there.
    trainer.ranks.on_main(lambda: len(build_trackers(config)))
    keep_freed_memory(trainer.ranks.device.type)
    console = Console(active=trainer.ranks.is_main)
    with trainer.run.settings(), explained(trainer.run, lambda: (trainer.fuse, 1)):
        trainer.try_out()
        trainer.prove(thorough=True)
        facts = header(
            trainer.run,
            trainer.schedule,
            trainer.fuse,
            trainer.fuse_note,
            directory=run_path(config.run),
            proof=trainer.proof,
            optimizer=trainer.optimizer,
        )
        console.header(facts)
        start = perf_counter()
        row = _train_first_step(trainer)
        seconds = perf_counter() - start
        refused = refused_operations(trainer.run) if trainer.run.bitwise else []
    console.note(_describe_first_step(trainer, row, seconds))
    for bad in trainer.run.quarantine.samples if trainer.run.quarantine else []:
        console.note(f"left out: {bad.name()}: {bad.reason}")
    for line in refused:
        console.note(
            f"on a GPU, run.reproducibility=bitwise would be refused for {line}"
        )
    trainer.ranks.close()


def _describe_first_step(trainer: Trainer, row: Row, seconds: float) -> str:
    size = trainer.run.remaining(trainer.plan.step(0)).size
    samples = f"{size} sample" if size == 1 else f"{size} samples"
    metrics = []
    for name, value in row.items():
        if name.startswith("train/"):
            metrics.append(f"{name} {value:.4g}")
    return (
        f"this runs: a first step of {samples} in {seconds:.2f} s, {', '.join(metrics)}"
    )


def _train_first_step(trainer: Trainer) -> Row:
    """The row that the first step would log. Raises `LockstepError` if its loss or gradient is not finite."""
    step = trainer.plan.step(0)
    trainer.start()
    try:
        trainer.train_step(step)
        row = trainer.measure(step)
        trainer.finite.check(trainer.progress)
    finally:
        trainer.end_loading()
    return row
