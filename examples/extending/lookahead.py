"""A subclass of Trainer that changes the weights after a step: python -m examples.extending.lookahead [key=value …]"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from trainer import Config, Step, Trainer, load


class LookaheadTrainer(Trainer):
    """Every fifth step, slow weights move halfway to the model's, and the model goes on from there.

    Zhang et al., 2019, "Lookahead optimizer: k steps forward, 1 step back".
    """

    def __init__(self, config: Config, **objects: Any) -> None:
        super().__init__(config, **objects)
        # It has `state_dict` and `load_state_dict`, so checkpoints keep it, as "slow".
        self.slow = nn.ParameterList(
            parameter.detach().clone() for parameter in self.module.parameters()
        )

    def train_step(self, step: Step) -> None:
        super().train_step(step)
        if step.number % 5 == 0:
            self.look_ahead()

    @torch.no_grad()
    def look_ahead(self) -> None:
        for slow, fast in zip(self.slow, self.module.parameters(), strict=True):
            slow.lerp_(fast, 0.5)
            fast.copy_(slow)


if __name__ == "__main__":
    LookaheadTrainer(load("configs/digits.yaml", sys.argv[1:])).fit()
