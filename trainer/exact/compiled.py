"""Whether `torch.compile` runs a model."""

from __future__ import annotations

from torch import nn


def is_compiled(model: nn.Module) -> bool:
    """True if the model, or a part of it, was compiled in place."""
    return any(module._compiled_call_impl is not None for module in model.modules())
