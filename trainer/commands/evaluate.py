"""The best model's validation numbers, computed afresh."""

from __future__ import annotations

from trainer.commands.arguments import split, the_run
from trainer.core.build import build_run, settings_of
from trainer.storage.run_directory import read_config


def main(arguments: list[str]) -> None:
    """Load the best model of a run and print its validation numbers, on any number of processes."""
    given = split(arguments)
    directory = the_run(given.paths)
    config = read_config(directory, given.overrides)
    with settings_of(config):
        run = build_run(config)
        row = run.load_best(directory)
        metrics = run.evaluate() if run.evaluator is not None else {}
    run.ranks.close()
    if run.ranks.is_main:
        print(f"{directory}: best model, of epoch {row['epoch']} (step {row['step']})")
        for name, value in metrics.items():
            print(f"  val/{name}  {value:.6f}  (kept with {row.get(f'val/{name}', float('nan')):.6f})")
