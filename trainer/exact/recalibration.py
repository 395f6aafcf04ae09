"""Exact population statistics for BatchNorm, in place of running averages.

The mean and variance of each layer's inputs over all samples given, every element counted once, as in "precise
BatchNorm" (Wu and Johnson, 2021, "Rethinking 'Batch' in BatchNorm", section 3). The model runs in training
mode, so that each layer sees inputs normalised as they are in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

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

    Each comes with its index among all. The sums of each are kept apart, and between ranks they meet only zeros, so
    the result is the same, bit for bit, on any number of ranks. Layers in eval mode, frozen ones among them, and
    counters of batches are left alone.
    """
    layers = [layer for layer in norm_layers(model) if isinstance(layer, _BatchNorm) and layer.training]
    if not layers:
        return
    counters = [layer.num_batches_tracked.clone() for layer in layers if layer.num_batches_tracked is not None]
    moments = [_Moments(layer, count, ranks.device) for layer in layers]
    try:
        with _uncompiled(model):
            for index, forward in forwards:
                for sums in moments:
                    sums.index = index
                forward()
    finally:
        for sums in moments:
            sums.hook.remove()
    for layer, sums, counter in zip(layers, moments, counters, strict=True):
        _set_statistics(layer, ranks.sum_(sums.rows).sum(0))
        assert layer.num_batches_tracked is not None
        layer.num_batches_tracked.copy_(counter)


def _uncompiled(model: nn.Module) -> AbstractContextManager[object]:
    """A context in which a compiled model runs as it was written.

    torch.compile would make the hooks part of its kernels, anew for every index that they count, until it gives up.
    """
    is_compiled = any(module._compiled_call_impl is not None for module in model.modules())
    return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()


class _Moments:
    """Count, Σ x and Σ x² of each channel of a layer's input, a row for each forward."""

    def __init__(self, layer: _BatchNorm, forwards: int, device: torch.device) -> None:
        self.rows = torch.zeros(forwards, 1 + 2 * layer.num_features, dtype=torch.float64, device=device)
        self.index = 0
        self.hook = layer.register_forward_pre_hook(self._add)

    def _add(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach()
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        all_but_channels = [dim for dim in range(x.dim()) if dim != 1]
        variance, mean = (moment.double() for moment in torch.var_mean(x, all_but_channels, correction=0))
        count = x.numel() // x.shape[1]
        sums = [mean.new_full((1,), count), count * mean, count * (variance + mean**2)]
        self.rows[self.index] += torch.cat(sums)


def _set_statistics(layer: _BatchNorm, total: Tensor) -> None:
    """Mean and, as torch keeps it, the unbiased variance."""
    count = total[0]
    mean, mean_of_squares = (total[1:] / count).view(2, -1)
    variance = mean_of_squares - mean**2
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(variance * count / (count - 1).clamp(min=1))
