"""Histograms of weights and gradients, counted on the device; of a large model, of some tensors only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trainer.core.build import Run
from trainer.core.observers import Observer
from trainer.exact.plan import Step

if TYPE_CHECKING:
    from trainer.reporting.journal import Journal

MOST_TENSORS = 64  # evenly spread over the model's parameters: what a set of histograms costs is bounded
BINS = 64

Histogram = tuple[list[float], list[float]]  # counts, and the edges of the bins, one more


@torch.no_grad()
def take_histograms(module: nn.Module) -> dict[str, Histogram]:
    """`weights/<name>` and `gradients/<name>` of the trained parameters that have a gradient. A host sync."""
    trained = [(name, p) for name, p in module.named_parameters() if p.grad is not None]
    count = min(len(trained), MOST_TENSORS)
    found = {}
    for name, parameter in (trained[i * len(trained) // count] for i in range(count)):
        for kind, tensor in (("weights", parameter), ("gradients", parameter.grad)):
            assert tensor is not None
            if (histogram := _histogram(tensor)) is not None:
                found[f"{kind}/{name}"] = histogram
    return found


def _histogram(tensor: Tensor) -> Histogram | None:
    """None where a value is no finite number: there are no bins for it."""
    values = tensor.detach().float().flatten()
    low, high = torch.stack(values.aminmax()).tolist()
    if not torch.isfinite(torch.tensor([low, high])).all():
        return None
    if low == high:
        low, high = low - 0.5, high + 0.5
    return torch.histc(values, BINS, low, high).tolist(), torch.linspace(low, high, BINS + 1).tolist()


class Histograms(Observer):
    """Sends histograms of weights and gradients to W&B, every `every` steps. Waits for the device at those steps."""

    def __init__(self, journal: Journal, every: int) -> None:
        self._journal = journal
        self._every = every

    def begin(self, run: Run) -> None:
        self._module = run.module

    def gradient(self, step: Step) -> None:
        if step.number % self._every == 0:
            self._journal.histograms(step.number, self._module)
