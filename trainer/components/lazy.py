"""Lazy layers: those that take their size from the first input that they see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map

from trainer.components.calling import call_model
from trainer.errors import ConfigError
from trainer.exact.modes import preserved_modes
from trainer.exact.seeding import key, preserved_cpu_generators, seed_cpu


def give_lazy_layers_sizes(model: nn.Module, inputs: Any, seed: int) -> None:
    """Run a model with lazy layers once, so that they have their size, and initial weights drawn from `seed`.

    Any other model is left alone. Raises `ConfigError` if the model does not run on `inputs`.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if not any(is_lazy(tensor) for tensor in tensors):
        return
    try:
        with preserved_modes(model), preserved_cpu_generators(), torch.no_grad():
            seed_cpu(key(seed, "lazy weights"))
            call_model(model.eval(), tree_map(_as_model_takes_it, inputs))
    except Exception as error:
        # Anything: the model is other people's code.
        raise ConfigError(
            "model.name",
            f"its lazy layers need a first input, and the model fails on the data's first sample "
            f"({type(error).__name__}: {error}); run the model once before it is passed, or give its layers sizes",
        ) from error


def _as_model_takes_it(value: Any) -> Any:
    """A tensor on the CPU and in the dtype of weights that are not yet there."""
    if not isinstance(value, Tensor):
        return value
    value = value.cpu()
    return value.float() if value.is_floating_point() else value
