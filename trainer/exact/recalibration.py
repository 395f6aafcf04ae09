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

from trainer.exact.compiled import is_compiled
from trainer.exact.model_and_loss import ModelAndLoss
from trainer.exact.moving_buffers import preserved_buffers
from trainer.process.device import sum_dtype
from trainer.process.ranks import Ranks

# Each with its index among those of all ranks; None for one that counts nowhere.
Forwards = Iterable[tuple[int | None, Callable[[], object]]]


@torch.no_grad()
def recalibrate(
    model: ModelAndLoss, forwards: Forwards, count: int, ranks: Ranks
) -> None:
    """Set the statistics of the BatchNorm layers of model and loss from `count` forwards. A collective.

    `forwards` are this rank's. The sums of each forward are kept apart and meet only
    zeros between ranks, so the result is the same, bit for bit, on any number of ranks. Layers in eval mode, frozen
    ones among them, all other buffers, and counters of batches are left alone.
    """
    moments = []
    for _, layer in model.named_norm_layers():
        if isinstance(layer, _BatchNorm) and layer.training:
            moments.append(_Moments(layer, count, ranks.device))
    if not moments:
        return
    try:
        with _uncompiled(model.model), preserved_buffers(model, norms=True):
            for index, forward in forwards:
                for sums in moments:
                    sums.index = index
                forward()
    finally:
        for sums in moments:
            sums.hook.remove()
    for sums in moments:
        total = ranks.sum_(sums.rows).sum(0)
        sums.set_statistics(total)


def _uncompiled(model: nn.Module) -> AbstractContextManager[object]:
    """A context in which a compiled model runs as it was written.

    torch.compile would make the hooks part of its kernels, anew for every index that they count, until it gives up.
    """
    stance: AbstractContextManager[object] = nullcontext()
    if is_compiled(model):
        stance = torch.compiler.set_stance("force_eager")
    return stance


class _Moments:
    """Count, Σ x and Σ x² of each channel of a layer's input, a row for each forward."""

    def __init__(self, layer: _BatchNorm, forwards: int, device: torch.device) -> None:
        columns = 1 + 2 * layer.num_features
        self._dtype = sum_dtype(device)
        self.rows = torch.zeros(forwards, columns, dtype=self._dtype, device=device)
        self.index: int | None = None
        self.hook = layer.register_forward_pre_hook(self._add)
        self._layer = layer

    def _add(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self.index is None:
            return
        x = inputs[0].detach()
        at_least_fp32 = torch.promote_types(x.dtype, torch.float32)
        x = x.to(at_least_fp32)
        all_but_channels = [dim for dim in range(x.dim()) if dim != 1]
        # Not Σ x² of fp32 numbers at once: where the mean is large, that leaves no digits for the variance.
        variance, mean = torch.var_mean(x, all_but_channels, correction=0)
        variance = variance.to(self._dtype)
        mean = mean.to(self._dtype)
        count = x.numel() // x.shape[1]
        mean_of_squares = variance + mean**2
        row = [
            mean.new_full((1,), count),
            count * mean,
            count * mean_of_squares,
        ]
        # Added: a layer may be called more than once in a forward.
        self.rows[self.index] += torch.cat(row)

    def set_statistics(self, total: Tensor) -> None:
        """Set the layer's mean and, as torch keeps it, the unbiased variance, from the sum of all rows."""
        layer = self._layer
        assert layer.running_mean is not None
        assert layer.running_var is not None
        count = total[0]
        mean, mean_of_squares = (total[1:] / count).view(2, -1)
        variance = mean_of_squares - mean**2
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(variance * count / (count - 1).clamp(min=1))
