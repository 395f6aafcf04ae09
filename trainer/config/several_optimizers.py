"""A config has one optimizer: several of them need a step that says which one trains what, and when."""

from __future__ import annotations

from typing import Any

from trainer.errors import ConfigError


def refuse_several_optimizers(section: Any) -> None:
    """Raise `ConfigError` for an `optimizer` that is a list."""
    if isinstance(section, list | tuple):
        raise ConfigError(
            "optimizer",
            "is one optimizer, not a list; for several, as a GAN has them, subclass trainer.Trainer and override "
            "train_step: docs/extending.md shows one whole (other settings for a part of the parameters: see "
            "optimizer.groups)",
        )
