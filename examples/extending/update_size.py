"""An observer: it watches every step and adds a column to the log."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from trainer import Observer, Run, Step


class UpdateSize(Observer):
    """Logs how far a step moves the weights, relative to their length, of every `every`-th step."""

    def __init__(self, every: int = 1) -> None:
        self.every = every
        self.ratio: Tensor | None = None

    def begin(self, run: Run) -> None:
        self.parameters = list(run.module.parameters())

    @torch.no_grad()
    def gradient(self, step: Step) -> None:
        """Before the update."""
        if step.number % self.every == 0:
            self.before = [parameter.clone() for parameter in self.parameters]

    @torch.no_grad()
    def step(self, step: Step) -> None:
        """After the update. The ratio stays a tensor on the device, so the step waits for nothing."""
        if step.number % self.every == 0:
            changes = [
                after - before
                for after, before in zip(self.parameters, self.before, strict=True)
            ]
            self.ratio = get_total_norm(changes) / get_total_norm(self.before)

    def row(self, row: dict[str, float]) -> None:
        """A row is logged every `train.log_every` steps, and waits for the device anyway."""
        if self.ratio is not None:
            row["update_size"] = self.ratio.item()
