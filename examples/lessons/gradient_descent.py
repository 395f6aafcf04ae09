"""An optimizer of one's own: plain gradient descent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class GradientDescent(Optimizer):
    """`p ← p − lr · ∂L/∂p` for every parameter: no momentum, no weight decay, no state.

    The schedule sets `lr` in `param_groups` before each step, so it is read there and not kept from the constructor.
    """

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update from the gradients that are there; a parameter without one stays as it is."""
        assert closure is None, "the trainer has run the backward already"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-group["lr"])
