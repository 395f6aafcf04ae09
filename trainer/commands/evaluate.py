"""Compute the best model's validation numbers afresh.

lockstep evaluate runs/digits
lockstep evaluate runs/digits data.root=PATH batch.eval_size=256
torchrun --nproc_per_node 2 -m trainer evaluate runs/digits

Every validation set is evaluated, and the test set if there is one.
Classes are matched by name: other data may have some of the run's classes, in any order.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.commands.arguments import CommandParser
from trainer.process.memory import keep_freed_memory

if TYPE_CHECKING:
    from trainer.config.schema import Config
    from trainer.core.metrics import Row
    from trainer.core.run import Run


def main(arguments: list[str]) -> None:
    """Print each validation metric of a run's best model, beside the one logged when the model was saved."""
    parser = CommandParser("evaluate", __doc__)
    parser.add_run()
    parser.add_trust()
    parser.add_overrides("changes a key of the run's config")
    options = parser.parse(arguments)

    from trainer.config.run_sections import BestConfig
    from trainer.core.build import build_run
    from trainer.core.evaluated_weights import best_evaluation
    from trainer.core.run import settings_of
    from trainer.core.trust import read_trusted_config
    from trainer.storage import best_model, signature
    from trainer.storage.shared_config import read_config_on_all, read_on_main

    def read() -> Config:
        imports = ("model", "data", "loss", "metrics")
        return read_trusted_config(
            options.run, options.overrides, options.trust, imports=imports
        )

    config = _without_training(read_config_on_all(options.run, options.overrides, read))
    trained_on = read_on_main(lambda: signature.read(best_model.directory(options.run)))
    evaluation = best_evaluation(config)
    with settings_of(config):
        # What was best is known: its metric may be one that was passed in Python.
        config = replace(config, best=BestConfig())
        run = build_run(config, classes=trained_on.classes)
        keep_freed_memory(run.ranks.device.type)
        logged = run.load_best(options.run)
        metrics = _evaluate(run, evaluation)
        run.end_evaluations()
    logged |= _logged_at_end(options.run) if run.ranks.is_main else {}
    run.ranks.close()
    if run.ranks.is_main:
        print(
            f"{options.run}: best model, of epoch {logged['epoch']} (step {logged['step']})"
        )
        changes = _changes_of_data(options.run, run)
        if changes:
            print(f"  note  not the data that the run was validated on: {changes}")
        for bad in run.quarantine.samples if run.quarantine else []:
            print(f"  note  left out: {bad.name()}: {bad.reason}")
        for note in run.metrics.take_notes():
            print(f"  note  {note}")
        for name, value in metrics.items():
            before = logged.get(name, math.nan)
            print(f"  {name}  {value:.6f}  (logged as {before:.6f})")


def _evaluate(run: Run, evaluation: str) -> Row:
    """The metrics of every set, by the names under which a run logs them in `evaluation`. A collective."""
    from trainer.core.evaluated_weights import evaluated_phase

    metrics: Row = {}
    for item in run.evaluation_sets:
        for name, value in item.evaluator.evaluate().items():
            # The best model may be the average, whose metrics have names of their own.
            phase = evaluated_phase(item.phase, evaluation)
            metrics[f"{phase}/{name}"] = value
    return metrics


def _logged_at_end(directory: Path) -> Row:
    """The metrics of the test set, which are in the summary of a run that has ended."""
    path = directory / "summary.json"
    if not path.is_file():
        return {}
    values = json.loads(path.read_text())
    return {name: value for name, value in values.items() if name.startswith("test/")}


def _without_training(config: Config) -> Config:
    """The config without what only training needs of the data, and other data may not have."""
    return replace(
        config,
        data=replace(config.data, sampler={}, epoch_samples=None, decode="cpu"),
        train=replace(config.train, mix={}),
    )


def _changes_of_data(directory: Path, run: Run) -> str:
    """What differs between the samples that the run in `directory` was evaluated on and `run`'s; "" for nothing."""
    from trainer.storage.data_record import describe_part, pairs_of_sets, read_record

    record = read_record(directory)
    if record is None:
        return ""
    changes = []
    for phase, was, is_now in pairs_of_sets(record, run.data):
        changes.append(describe_part(phase, was, is_now, run.data.classes))
    return "; ".join(filter(None, changes))
