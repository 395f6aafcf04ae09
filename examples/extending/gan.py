"""Two optimizers: a generative adversarial network: python -m examples.extending.gan [key=value …]"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from trainer import (
    Config,
    MicroBatch,
    Observer,
    Step,
    Task,
    Trainer,
    WeightedSum,
    load,
)

NOISE = 16


class DigitsAndNoise:
    """What the generator is given, `(16,)`, and a real digit, `(1, 8, 8)` in [-1, 1].

    Draws of a data set are keyed by the sample and the epoch, so the noise is the same on any number of processes.
    """

    def __init__(self, train: bool) -> None:
        images = torch.tensor(load_digits().images, dtype=torch.float32) / 8 - 1
        self.images = images[:1400] if train else images[1400:]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.randn(NOISE), self.images[index].unsqueeze(0)


def generator() -> nn.Module:
    """The model of the config: noise `(N, 16)` → images `(N, 1, 8, 8)`."""
    return nn.Sequential(
        nn.Linear(NOISE, 128),
        nn.BatchNorm1d(128),
        nn.ReLU(),
        nn.Linear(128, 64),
        nn.Tanh(),
        nn.Unflatten(1, (1, 8, 8)),
    )


class Adversarial(Task):
    """The generator's loss: the discriminator shall take its images for real ones.

    Goodfellow et al., 2014, "Generative adversarial nets", with the non-saturating loss. The discriminator is a part
    of the loss, so checkpoints and the best model have it. It does not draw, and has no norm layers: those would learn
    from the generator's step as well.
    """

    metrics = ("fooled", "recognized")
    metrics_add_up = True

    def __init__(self) -> None:
        super().__init__()
        self.discriminator = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1)
        )
        # Not by the config's optimizer, which would make it err.
        self.discriminator.requires_grad_(False)

    def loss_sum(self, output: Tensor, targets: Tensor) -> WeightedSum:
        return WeightedSum(F.softplus(-self.discriminator(output)).sum(), len(output))

    def metric_sums(self, output: Tensor, targets: Tensor) -> dict[str, WeightedSum]:
        """The shares of images that the discriminator takes for real: of made ones, and of real ones."""
        fooled = self.discriminator(output) > 0
        recognized = self.discriminator(targets.to(output)) > 0
        return {
            "fooled": WeightedSum(fooled.sum(), len(output)),
            "recognized": WeightedSum(recognized.sum(), len(targets)),
        }


class Images(Observer):
    """Keeps the made images of this rank's part of a step."""

    def __init__(self) -> None:
        self.of_step: list[tuple[MicroBatch, Tensor]] = []

    def micro_batch(
        self, step: Step, batch: MicroBatch, output: Tensor, loss: WeightedSum
    ) -> None:
        self.of_step.append((batch, output.detach()))


class GanTrainer(Trainer):
    """Each step trains the generator as it would any model, then the discriminator on the same images."""

    def __init__(self, config: Config, **objects: Any) -> None:
        super().__init__(config, **objects)
        discriminator = self.run.task.discriminator
        assert isinstance(discriminator, nn.Module)
        self.discriminator = discriminator.requires_grad_(True)
        # It has `state_dict` and `load_state_dict`, so checkpoints keep it.
        self.second_optimizer = torch.optim.Adam(
            self.discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999)
        )
        # What sums the gradient over micro-batches and processes, in the run's mode.
        self.second_reduction = self.reduction_for(self.discriminator)
        self.discriminator.requires_grad_(False)
        self.images = Images()
        self.observers.add(self.images)

    def train_step(self, step: Step) -> None:
        self.images.of_step.clear()
        super().train_step(step)
        step = self.run.remaining(step)  # without samples that cannot be read
        if step.size:
            self.discriminator.requires_grad_(True)
            self.train_discriminator(step)
            self.discriminator.requires_grad_(False)

    def train_discriminator(self, step: Step) -> None:
        reduction = self.second_reduction
        reduction.begin(step)
        for batch, made in self.images.of_step:
            with reduction.micro_batch(step, batch.indices) as discriminator:
                both = torch.cat([made, batch.targets.to(made)])
                for_made, for_real = discriminator(both).chunk(2)
                loss = F.softplus(for_made).sum() + F.softplus(-for_real).sum()
                scale = reduction.loss_scale(step, batch.indices, loss, len(made))
                loss.backward(scale)
        reduction.finish(step)
        self.second_optimizer.step()
        self.second_optimizer.zero_grad()


SETTINGS = {
    "run.name": "gan",
    "data.name": "examples.extending.gan.DigitsAndNoise",
    "model.name": "examples.extending.gan.generator",
    "loss.name": "examples.extending.gan.Adversarial",
    "optimizer.name": "adam",
    "optimizer.lr": 0.0002,
    "optimizer.betas": [0.5, 0.999],
    "schedule.name": "constant",
    "best.metric": "val/fooled",
    "best.mode": "max",
}

if __name__ == "__main__":
    overrides = [f"{key}={value}" for key, value in SETTINGS.items()]
    GanTrainer(load("configs/digits.yaml", overrides + sys.argv[1:])).fit()
