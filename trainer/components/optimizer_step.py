"""An optimizer's update, and the end of its gradients, without torch's marks for a profiler where none listens.

torch wraps both methods in such marks, which together take about as long as the update of a small net.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer


def update(optimizer: Optimizer) -> None:
    """Do what `optimizer.step()` does. Hooks, and a profiler that listens, see it as they would."""
    step: Any = type(optimizer).step
    # As torch marks its own wrapper, which holds the class's method.
    is_wrapped = getattr(step, "hooked", False) and hasattr(step, "__wrapped__")
    if is_wrapped and not _is_watched(optimizer):
        step.__wrapped__(optimizer)
    else:
        optimizer.step()


def forget_gradients(optimizer: Optimizer) -> None:
    """Do what `optimizer.zero_grad()` does: every gradient becomes None."""
    is_overridden = type(optimizer).zero_grad is not Optimizer.zero_grad
    if is_overridden or "zero_grad" in vars(optimizer):
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def _is_watched(optimizer: Optimizer) -> bool:
    """True if somebody's code would notice that torch's wrapper was left out."""
    attributes = vars(optimizer)
    return bool(
        "step" in attributes
        or attributes.get("_optimizer_step_pre_hooks", True)
        or attributes.get("_optimizer_step_post_hooks", True)
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
        or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    )
