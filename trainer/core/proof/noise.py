"""Parameters whose gradient is nothing but rounding: an adaptive optimizer makes whole steps of it.

A bias before BatchNorm has the gradient 0, because the layer subtracts the mean. What is computed is rounding noise,
and Adam divides it by its own size. Such a parameter goes another way on another number of processes, in standard
mode; the model's output does not depend on it.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from trainer.core.proof.state import without_trace
from trainer.core.proof.trial import Trial
from trainer.errors import listed

# Of the largest gradient of a layer's other parameters, in units of the dtype's rounding.
NOISE = 100.0
ADAPTIVE = ("adam", "rms", "adag", "adad", "rprop", "lion", "lamb", "novograd")
NAMES_IN_A_MESSAGE = 3


def note_noise(trial: Trial) -> list[str]:
    """A line that names the parameters with such gradients; none in bitwise mode, which shares noise, too."""
    if trial.exact or not is_adaptive(trial.optimizer):
        return []
    if trial.run.precision.autocasts:
        return []  # everything has few digits
    with without_trace(trial.run, weights=True):
        trial.forward_and_backward(trial.own_index)
        names = noisy_parameters(trial.module)
    if not names:
        return []
    shown = listed(names, NAMES_IN_A_MESSAGE)
    optimizer = type(trial.optimizer).__name__
    return [
        f"the gradient of {shown} is rounding noise, of which {optimizer} makes whole steps: on other "
        f"hardware they end elsewhere, and nothing else does (bias=False before a BatchNorm avoids it)"
    ]


def is_adaptive(optimizer: Optimizer | None) -> bool:
    """True for an optimizer that divides a gradient by its own size, as far as its name says."""
    names = [kind.__name__.lower() for kind in type(optimizer).__mro__]
    return any(word in name for name in names for word in ADAPTIVE)


def noisy_parameters(module: nn.Module) -> list[str]:
    """The parameters whose gradient is far smaller than those of the others of their layer, but not 0."""
    noisy = []
    for prefix, layer in module.named_modules():
        sizes = {}
        for name, parameter in layer.named_parameters(recurse=False):
            if parameter.grad is not None:
                sizes[name] = float(parameter.grad.abs().max())
        if not sizes:
            continue
        dtype = next(layer.parameters()).dtype
        bound = NOISE * torch.finfo(dtype).eps
        largest = max(sizes.values())
        for name, size in sizes.items():
            if 0 < size < bound * largest:
                noisy.append(f"{prefix}.{name}" if prefix else name)
    return noisy
