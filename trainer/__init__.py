"""Lockstep: the same training run on one GPU or many."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.components.task import Task, WeightedSum
    from trainer.config.load import load
    from trainer.config.schema import Config
    from trainer.errors import ConfigError, DataError, LockstepError, Stopped
    from trainer.trainer import Trainer

__all__ = ["Config", "ConfigError", "DataError", "LockstepError", "Stopped", "Task", "Trainer", "WeightedSum", "load"]

HOMES = {
    "Trainer": "trainer",
    "Task": "components.task",
    "WeightedSum": "components.task",
    "Config": "config.schema",
    "load": "config.load",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: reading a config, or `--help`, needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOMES.get(name, 'errors')}"), name)
