"""An observer with state: stochastic weight averaging, by torch's own functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, update_bn

from trainer import Observer, Run, Step

SAMPLES = 256  # of one forward for BatchNorm's statistics


class StochasticWeightAverage(Observer):
    """The mean of the weights after each epoch from `start_epoch` on, evaluated at the end of the run.

    Izmailov et al., 2018, "Averaging weights leads to wider optima and better generalization".
    """

    def __init__(self, start_epoch: int) -> None:
        self.start_epoch = start_epoch  # counted from 1

    def begin(self, run: Run) -> None:
        self.run = run
        self.average = AveragedModel(run.module)
        self.result: dict[str, float] = {}

    def step(self, step: Step) -> None:
        if step.last_in_epoch and step.epoch + 1 >= self.start_epoch:
            self.average.update_parameters(self.run.module)

    def evaluation(
        self, evaluation: str, step: Step, metrics: dict[str, float]
    ) -> None:
        """The last evaluation of the run is followed by that of the average, on every rank."""
        if evaluation != "val" or step.number < self.run.plan.total_steps:
            return
        model = self.run.module
        before = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(self.average.module.state_dict())
        with torch.no_grad():
            # No training step has run with these weights, so no running statistics fit them.
            update_bn(self.training_inputs(), model)
        self.result = self.run.evaluate()
        if self.run.ranks.is_main:
            self.write(model.state_dict())
        model.load_state_dict(before)

    def training_inputs(self) -> Iterator[Tensor]:
        """All training samples once. Every rank reads all of them, and so gets the same statistics."""
        ids = self.run.plan.permutation(0)
        for first in range(0, len(ids), SAMPLES):
            yield self.run.train_loader.peek(ids[first : first + SAMPLES]).inputs

    def write(self, state: Mapping[str, Tensor]) -> None:
        directory = Path(self.run.config.run.dir, self.run.config.run.name)
        tensors = {name: value.contiguous() for name, value in state.items()}
        save_file(tensors, directory / "swa.safetensors")

    def row(self, row: dict[str, float]) -> None:
        """The row of that evaluation comes next."""
        for name, value in self.result.items():
            row[f"swa/{name}"] = value
        self.result = {}

    def state_dict(self) -> Mapping[str, Any]:
        return self.average.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.average.load_state_dict(state)
