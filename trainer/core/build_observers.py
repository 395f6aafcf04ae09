"""The observers of a run: those of its config, those that were passed, and what the run itself needs."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.config.registry import build_observers
from trainer.core.empty_forwards import EmptyForwards
from trainer.core.observers import Observer, Observers
from trainer.core.run import Run
from trainer.core.save_predictions import SHORT_NAMES
from trainer.exact.reduction import Reduction
from trainer.exact.sharded import ShardedReduction


def observers_of_run(
    run: Run, reduction: Reduction, passed: Sequence[Observer]
) -> Observers:
    """Those of `run.config` come first. Raises `ConfigError` for one that cannot be built."""
    named = build_observers(run.config.observers, Observer, SHORT_NAMES)
    observers = Observers([*named, *passed], run.working_directory.enter)
    if isinstance(reduction, ShardedReduction):
        # Every forward needs all ranks, those with nothing to do in a step, too.
        empty = EmptyForwards(run, reduction)
        observers.add(empty)
        reduction.run_empty = empty.run
    return observers
