"""Lockstep: the same training run on one GPU or many."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.components.task import Task, WeightedSum
    from trainer.config.load import load
    from trainer.config.schema import Config
    from trainer.core.observers import Observer, Stateful
    from trainer.core.run import Run
    from trainer.data.batches import MicroBatch
    from trainer.data.datasets import MapDataset
    from trainer.errors import ConfigError, DataError, LockstepError, Stopped
    from trainer.exact.plan import Step
    from trainer.inspection.predictor import Predictor
    from trainer.process.launch import launch
    from trainer.reporting.trackers.base import Tracker
    from trainer.trainer import Trainer

__all__ = [
    "Config",
    "ConfigError",
    "DataError",
    "LockstepError",
    "MapDataset",
    "MicroBatch",
    "Observer",
    "Predictor",
    "Run",
    "Stateful",
    "Step",
    "Stopped",
    "Task",
    "Tracker",
    "Trainer",
    "WeightedSum",
    "launch",
    "load",
]

HOMES = {
    "Config": "config.schema",
    "ConfigError": "errors",
    "DataError": "errors",
    "LockstepError": "errors",
    "MapDataset": "data.datasets",
    "MicroBatch": "data.batches",
    "Observer": "core.observers",
    "Predictor": "inspection.predictor",
    "Run": "core.run",
    "Stateful": "core.observers",
    "Step": "exact.plan",
    "Stopped": "errors",
    "Task": "components.task",
    "Tracker": "reporting.trackers.base",
    "Trainer": "trainer",
    "WeightedSum": "components.task",
    "launch": "process.launch",
    "load": "config.load",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: reading a config, or `--help`, needs no torch."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # A program that uses a public name may end with one of our errors, which need no traceback.
    import_module(f"{__name__}.process.uncaught").report_uncaught_errors()
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
