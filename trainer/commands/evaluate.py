"""Compute the best model's validation numbers afresh.

lockstep evaluate runs/digits
lockstep evaluate runs/digits data.root=PATH batch.eval_size=256
torchrun --nproc_per_node 2 -m trainer evaluate runs/digits
"""

from __future__ import annotations

import math

from trainer.commands.arguments import CommandParser
from trainer.process.memory import keep_freed_memory


def main(arguments: list[str]) -> None:
    """Print each validation metric of a run's best model, beside the one logged when the model was saved."""
    parser = CommandParser("evaluate", __doc__)
    parser.add_run()
    parser.add_overrides("changes a key of the run's config")
    options = parser.parse(arguments)

    from trainer.core.build import build_run, settings_of
    from trainer.storage.shared_config import read_config_on_all

    config = read_config_on_all(options.run, options.overrides)
    with settings_of(config):
        run = build_run(config)
        keep_freed_memory(run.ranks.device.type)
        logged = run.load_best(options.run)
        metrics = run.evaluate() if run.evaluator is not None else {}
    run.ranks.close()
    if run.ranks.is_main:
        print(
            f"{options.run}: best model, of epoch {logged['epoch']} (step {logged['step']})"
        )
        for name, value in metrics.items():
            print(
                f"  val/{name}  {value:.6f}  (logged as {logged.get(f'val/{name}', math.nan):.6f})"
            )
