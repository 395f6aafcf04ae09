"""A task whose loss is of a whole step: SimCLR on digits: python -m examples.extending.contrastive [key=value …]"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from trainer import Task, Trainer, WeightedSum, load


class TwoViews:
    """Two random views of each digit, `(2, 1, 8, 8)`: moved by up to a pixel, with noise."""

    def __init__(self, train: bool) -> None:
        images = torch.tensor(load_digits().images, dtype=torch.float32) / 16
        self.images = images[:1400] if train else images[1400:]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The views, and a target that the loss does not read."""
        return torch.stack([self.view(index), self.view(index)]), 0

    def view(self, index: int) -> Tensor:
        """Draws are keyed by the sample, so a view does not depend on who loads it."""
        padded = F.pad(self.images[index], (1, 1, 1, 1))
        top, left = torch.randint(3, (2,)).tolist()
        view = padded[top : top + 8, left : left + 8]
        return (view + 0.1 * torch.randn(8, 8)).unsqueeze(0)


class Contrastive(Task):
    """InfoNCE: each view must find its partner among all other views of the step, on whichever process they are.

    Chen et al., 2020, "A simple framework for contrastive learning of visual representations". The temperature is
    trained.
    """

    whole_step = True
    compares_samples = True
    metrics = ("partner",)
    directions: Mapping[str, str] = {"partner": "max"}

    def __init__(self, temperature: float = 0.2) -> None:
        super().__init__()
        self.log_temperature = nn.Parameter(torch.tensor(temperature).log())

    def predict(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Both views of a micro-batch's samples, `(N, 2, dimensions)`: a row for each sample."""
        embeddings = F.normalize(model(inputs.flatten(0, 1)), dim=1)
        return embeddings.unflatten(0, inputs.shape[:2])

    def loss_sum(self, output: Tensor, targets: Tensor) -> WeightedSum:
        """`output` has the views of all samples of the step, in order, and in an evaluation those of a batch."""
        total = F.cross_entropy(
            self.scores(output), self.partners(output), reduction="sum"
        )
        return WeightedSum(total, 2 * len(output))

    def metric_sums(self, output: Tensor, targets: Tensor) -> dict[str, WeightedSum]:
        is_found = self.scores(output).argmax(1) == self.partners(output)
        return {"partner": WeightedSum(is_found.sum(), len(is_found))}

    def scores(self, output: Tensor) -> Tensor:
        """How alike two views are, `(2N, 2N)`: first all first views, then all second ones. None is its own partner."""
        views = torch.cat([output[:, 0], output[:, 1]])
        scores = views @ views.T / self.log_temperature.exp()
        return scores.masked_fill(
            torch.eye(len(views), dtype=torch.bool, device=views.device), -torch.inf
        )

    def partners(self, output: Tensor) -> Tensor:
        count = len(output)
        return torch.arange(2 * count, device=output.device).roll(count)


def encoder(dimensions: int = 32) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 128),
        nn.ReLU(),
        nn.Linear(128, dimensions),
    )


SETTINGS = {
    "run.name": "contrastive",
    "data.name": "examples.extending.contrastive.TwoViews",
    "model.name": "examples.extending.contrastive.encoder",
    "loss.name": "examples.extending.contrastive.Contrastive",
    "batch.size": 128,
    "batch.micro_size": 16,
    "best.metric": "val/partner",
}

if __name__ == "__main__":
    overrides = [f"{key}={value}" for key, value in SETTINGS.items()]
    Trainer(load("configs/digits.yaml", overrides + sys.argv[1:])).fit()
