"""Sample ids, augmented pixels and learning rates: equal in every step on any number of ranks and workers."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torchvision.transforms.v2  # noqa: F401 - imported once, before the ranks are forked

from tests.distributed.ranks import on_ranks
from tests.distributed.small import config
from trainer import Trainer
from trainer.data.train_loader import TrainLoader

Steps = dict[tuple[int, int], tuple[list[int], str, float]]

TRANSFORMS = [
    {"name": "RandomCrop", "size": 8, "padding": 2},
    {"name": "RandomHorizontalFlip"},
    {"name": "ColorJitter", "brightness": 0.5},
]


def steps(directory: Path, workers: int, first_step: int = 0) -> Steps:
    """What this rank runs: (step, micro-batch) → sample ids, digest of the pixels, learning rate."""
    settings = config(
        directory,
        data__name="fake",
        data__size=50,
        data__image_size=8,
        data__workers=workers,
        data__train_transforms=TRANSFORMS,
        batch__size=12,
        batch__micro_size=3,
        model__name="small_cnn",
        schedule__name="cosine",
        schedule__per="step",
        schedule__warmup=2,
    )
    trainer = Trainer(settings)
    loader = TrainLoader(
        trainer.run.train_loader, trainer.plan, trainer.ranks.rank, first_step
    )
    samples: Steps = {}
    for step in trainer.plan.steps(first_step):
        for batch in loader.step(step):
            ids = trainer.plan.sample_ids(step, batch.first).tolist()
            pixels = hashlib.sha256(
                batch.inputs.numpy().tobytes() + batch.targets.numpy().tobytes()
            ).hexdigest()
            samples[step.number, batch.first] = (
                ids,
                pixels,
                trainer.schedule.factor(step.number - 1),
            )
    return samples


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Steps:
    return on_ranks(1, steps, tmp_path_factory.mktemp("reference"), 0)[0]


def test_the_reference_is_worth_comparing_to(reference: Steps) -> None:
    """Every sample once an epoch, each augmented anew in each epoch and unlike its neighbours."""
    numbers = [number for number, _ in reference]
    assert max(numbers) == 10
    for epoch in (range(1, 6), range(6, 11)):
        ids = [
            i
            for (number, _), (ids, _, _) in reference.items()
            if number in epoch
            for i in ids
        ]
        assert sorted(ids) == list(range(50))
    assert len({pixels for _, pixels, _ in reference.values()}) == len(reference)
    assert len({lr for _, _, lr in reference.values()}) > 5


@pytest.mark.parametrize(
    ("ranks", "workers"),
    [(1, 1), (1, 2), (2, 0), (2, 2), (3, 0), (3, 1), (4, 0), (4, 1)],
)
def test_equal_on_any_ranks_and_workers(
    tmp_path: Path, reference: Steps, ranks: int, workers: int
) -> None:
    parts = on_ranks(ranks, steps, tmp_path, workers)
    assert sum(map(len, parts)) == len(reference)  # nothing is run twice
    assert {
        place: samples for part in parts for place, samples in part.items()
    } == reference


def test_equal_from_any_step_on(tmp_path: Path, reference: Steps) -> None:
    for first_step in (1, 4, 5, 7):
        parts = on_ranks(2, steps, tmp_path, 1, first_step)
        rest = {
            place: samples
            for place, samples in reference.items()
            if place[0] > first_step
        }
        assert {
            place: samples for part in parts for place, samples in part.items()
        } == rest


class DrawsFromEverything:
    """Three generators, as user data sets use them."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, i: int) -> tuple[object, int]:
        import random

        import numpy as np
        import torch

        return torch.tensor(
            [torch.rand(()).item(), random.random(), np.random.rand()],
            dtype=torch.float64,
        ), i


def test_the_generators_of_user_data_are_keyed_too(tmp_path: Path) -> None:
    def pixels(directory: Path, workers: int) -> list[list[float]]:
        settings = config(
            directory,
            batch__size=8,
            batch__micro_size=2,
            data__workers=workers,
            train__epochs=2,
        )
        data = DrawsFromEverything()
        from torch import nn

        trainer = Trainer(
            settings, model=nn.Linear(3, 20), train_data=data, val_data=data
        )
        loader = TrainLoader(
            trainer.run.train_loader, trainer.plan, trainer.ranks.rank, 0
        )
        return [
            [step.epoch, int(target), *row.tolist()]
            for step in trainer.plan.steps()
            for batch in loader.step(step)
            for row, target in zip(batch.inputs, batch.targets, strict=True)
        ]

    (reference,) = on_ranks(1, pixels, tmp_path, 0)
    # New in each epoch and sample.
    assert len({tuple(row[2:]) for row in reference}) == 40
    assert all(len({row[column] for row in reference}) == 40 for column in (2, 3, 4))
    assert sorted(
        row for part in on_ranks(3, pixels, tmp_path, 2) for row in part
    ) == sorted(reference)
