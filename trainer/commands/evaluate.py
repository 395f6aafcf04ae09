"""The best model's validation numbers, computed afresh."""

from __future__ import annotations

from trainer.commands.arguments import split, the_run
from trainer.storage.run_directory import read_config
from trainer.trainer import Trainer


def main(arguments: list[str]) -> None:
    """Load the best model of a run and print its validation numbers, on any number of processes."""
    given = split(arguments)
    run = the_run(given.paths)
    trainer = Trainer(read_config(run, given.overrides))
    kept = trainer.load_best(run)
    metrics = trainer.evaluator.evaluate() if trainer.evaluator else {}
    trainer.ranks.close()
    if trainer.ranks.is_main:
        print(f"{run}: best model, of epoch {kept['epoch']} (step {kept['step']})")
        for name, value in metrics.items():
            print(f"  val/{name}  {value:.6f}  (kept with {kept.get(f'val/{name}', float('nan')):.6f})")
