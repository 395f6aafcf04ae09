"""Optimizers that train one set of weights and evaluate another, as schedule-free ones do (Defazio et al., 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer


def is_switched(optimizer: Optimizer) -> bool:
    """True for an optimizer with weights for training and others for evaluation, as schedule-free ones have."""
    return callable(getattr(optimizer, "train", None)) and callable(
        getattr(optimizer, "eval", None)
    )


def begin_training(optimizer: Optimizer) -> None:
    """Have the parameters be the weights to train. Does nothing for an optimizer with one set of weights."""
    if is_switched(optimizer):
        _methods(optimizer).train()


@contextmanager
def evaluation_weights(optimizer: Optimizer) -> Iterator[None]:
    """A context in which the parameters are the weights to evaluate; after it, bit for bit what they were.

    The optimizer's own way back would round, so that training depended on how often it is evaluated.
    """
    if not is_switched(optimizer):
        yield
        return
    parameters = [
        parameter for group in optimizer.param_groups for parameter in group["params"]
    ]
    before = [parameter.detach().clone() for parameter in parameters]
    _methods(optimizer).eval()
    try:
        yield
    finally:
        _methods(optimizer).train()
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


def _methods(optimizer: Any) -> Any:
    return optimizer
