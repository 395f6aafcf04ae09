"""Exact population statistics for BatchNorm, in place of running averages.

The mean and variance of each layer's inputs over all samples given, every element counted once, as in "precise
BatchNorm" (Wu and Johnson, 2021, "Rethinking 'Batch' in BatchNorm", section 3). The model runs in training
mode, so that each layer sees inputs normalised as they are in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainer.exact.batch_norm import norm_layers
from trainer.process.ranks import Ranks


@torch.no_grad()
def recalibrate(
    model: nn.Module, forwards: Iterable[tuple[int, Callable[[], object]]], count: int, ranks: Ranks
) -> None:
    """Set the statistics of the model's BatchNorm layers from `count` forwards, of which this rank's are given.

    Each comes with its place among all. Their sums are kept apart and meet only zeros on the way between ranks,
    so the result is the same, bit for bit, on any number of them. Layers in eval mode (frozen ones) and counters
    of batches are left alone.
    """
    layers = [layer for layer in norm_layers(model) if isinstance(layer, _BatchNorm) and layer.training]
    if not layers:
        return
    counters = [layer.num_batches_tracked.clone() for layer in layers if layer.num_batches_tracked is not None]
    sums = [
        torch.zeros(count, 1 + 2 * layer.num_features, dtype=torch.float64, device=ranks.device) for layer in layers
    ]
    place = [0]
    hooks = [layer.register_forward_pre_hook(_adder(rows, place)) for layer, rows in zip(layers, sums, strict=True)]
    try:
        for place[0], forward in forwards:
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    for layer, rows, counter in zip(layers, sums, counters, strict=True):
        _set_statistics(layer, ranks.sum_(rows).sum(0))
        assert layer.num_batches_tracked is not None
        layer.num_batches_tracked.copy_(counter)


def _adder(rows: Tensor, place: list[int]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A hook that adds a layer's input to the row of the present place: count, Σ x, Σ x² of each channel."""

    def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach()
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        dims = [d for d in range(x.dim()) if d != 1]
        variance, mean = (t.double() for t in torch.var_mean(x, dims, correction=0))
        count = x.numel() // x.shape[1]
        rows[place[0]] += torch.cat([mean.new_full((1,), count), count * mean, count * (variance + mean**2)])

    return add


def _set_statistics(layer: _BatchNorm, total: Tensor) -> None:
    """Mean and, as torch keeps it, the unbiased variance."""
    count, moments = total[0], (total[1:] / total[0]).view(2, -1)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_mean.copy_(moments[0])
    layer.running_var.copy_((moments[1] - moments[0] ** 2) * count / (count - 1).clamp(min=1))
