"""What the commands that train or evaluate begin with: the process's settings, and the `Trainer`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.process.memory import keep_freed_memory

if TYPE_CHECKING:
    from trainer.config.schema import Config
    from trainer.trainer import Trainer


def set_up_trainer(config: Config) -> Trainer:
    """Build the `Trainer`, and make the settings that belong to the process rather than to a `Trainer`."""
    from trainer.trainer import Trainer  # imports torch: mistakes in arguments and config are reported before

    trainer = Trainer(config)
    if trainer.ranks.device.type == "cpu":
        keep_freed_memory()
    return trainer
