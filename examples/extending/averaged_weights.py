"""An observer with state: an average of the weights, which every checkpoint keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trainer import Observer, Run, Step


class AveragedWeights(Observer):
    """An exponential moving average of the weights, evaluated whenever the model is."""

    def __init__(self, decay: float = 0.99) -> None:
        self.decay = decay

    def begin(self, run: Run) -> None:
        self.run = run
        self.average = AveragedModel(
            run.module, multi_avg_fn=get_ema_multi_avg_fn(self.decay)
        )

    def step(self, step: Step) -> None:
        self.average.update_parameters(self.run.module)

    def row(self, row: dict[str, float]) -> None:
        """Add the loss of the averaged weights to a row with an evaluation. Every rank evaluates its part."""
        if "val/loss" not in row:
            return
        model = self.run.module
        weights = {
            name: parameter.detach().clone()
            for name, parameter in model.named_parameters()
        }
        averages = dict(self.average.module.named_parameters())
        # Not strict: the running statistics stay the model's.
        model.load_state_dict(averages, strict=False)
        row["val/averaged_loss"] = self.run.evaluate()["loss"]
        model.load_state_dict(weights, strict=False)

    def state_dict(self) -> Mapping[str, Any]:
        """It holds running statistics, so `step` finds the whole of the model's on every rank."""
        return self.average.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.average.load_state_dict(state)
