"""Histograms of weights and gradients for W&B, counted on the device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.core.observers import Observer
from trainer.exact.plan import Step
from trainer.reporting.wandb.files import Histogram
from trainer.reporting.wandb.run import WandbRun

# Evenly spread over a model's parameters, so that the cost of a large model is bounded.
MAX_TENSORS = 64
BINS = 64  # as many as `wandb.Histogram` makes by default


class HistogramObserver(Observer):
    """Every `every` steps, sends histograms of a module's weights and gradients to a W&B run.

    It waits for the device in those steps, and only in those.
    """

    may_stop = False

    def __init__(self, module: nn.Module, run: WandbRun, every: int) -> None:
        self._module = module
        self._run = run
        self._every = every

    def gradient(self, step: Step) -> None:
        if step.number % self._every == 0:
            self._run.log_histograms(step.number, take_histograms(self._module))


@torch.no_grad()
def take_histograms(module: nn.Module) -> dict[str, Histogram]:
    """`weights/<name>` and `gradients/<name>` of the parameters that have a gradient, at most MAX_TENSORS of them.

    Waits for the device. A tensor with a NaN or an infinity has no histogram.
    """
    histograms = {}
    for name, parameter, gradient in _pick_parameters(module):
        for kind, tensor in (("weights", parameter), ("gradients", gradient)):
            histogram = _count(tensor)
            if histogram is not None:
                histograms[f"{kind}/{name}"] = histogram
    return histograms


def _pick_parameters(module: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
    trained = []
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            trained.append((name, parameter, parameter.grad))
    count = min(len(trained), MAX_TENSORS)
    chosen: list[tuple[str, Tensor, Tensor]] = []
    for number in range(count):
        # Evenly spread from the first layer to the last, and the same tensors every time.
        index = number * len(trained) // count
        chosen.append(trained[index])
    return chosen


def _count(tensor: Tensor) -> Histogram | None:
    values = tensor.detach().float().flatten()
    low, high = torch.stack(values.aminmax()).tolist()
    # A NaN or an infinity anywhere in the tensor is in its extremes, too.
    if not torch.isfinite(torch.tensor([low, high])).all():
        return None
    if low == high:
        # Bins need a width: equal values fall into the middle one.
        low, high = low - 0.5, high + 0.5
    # Not `torch.histc`: on CUDA, bitwise mode refuses it. Whole numbers add up to the same counts in any order.
    bins_a_unit = BINS / (high - low)
    # The largest value would be in a bin of its own, past the last.
    bins = ((values - low) * bins_a_unit).long().clamp(0, BINS - 1)
    counts = torch.bincount(bins, minlength=BINS)
    edges = torch.linspace(low, high, BINS + 1)
    return Histogram(counts.tolist(), edges.tolist())
