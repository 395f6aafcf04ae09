"""Sets in memory: micro-batches of several steps by one look-up, the same to the last bit as one at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.config.data_section import DataConfig
from trainer.data.datasets import ImageArrays
from trainer.data.left_out import train_loader
from trainer.data.loading import Loader, build_loader
from trainer.data.look_up import BYTES_AT_ONCE, CACHE_LINE, LookUpLoader
from trainer.data.train_loader import TrainLoader
from trainer.exact.plan import Plan, Step

SAMPLES = 103
SHAPE = (2, 4, 4)


class Counted(ImageArrays):
    """Counts its look-ups."""

    look_ups: list[int]

    def batch(self, ids: Any) -> tuple[Tensor, Tensor]:
        self.look_ups.append(len(ids))
        return super().batch(ids)


def images(samples: int = SAMPLES, shape: tuple[int, ...] = SHAPE) -> Counted:
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (samples, *shape), generator=draw, dtype=torch.uint8)
    data = Counted(pixels, torch.arange(samples))
    object.__setattr__(data, "look_ups", [])
    return data


def loader_of(data: ImageArrays, transforms: Any = (), **section: Any) -> Loader:
    settings = DataConfig(mean=[0.5], std=[0.2], **section)
    return build_loader(
        settings,
        data,
        "train",
        list(transforms),
        seed=1,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def plan_of(**changes: Any) -> Plan:
    settings: dict[str, Any] = {
        "samples": SAMPLES,
        "batch_size": 24,
        "micro_size": 5,
        "ranks": 1,
        "epochs": 3,
        "seed": 1,
    }
    return Plan(**settings | changes)


def train(loader: Loader, plan: Plan, rank: int = 0, fuse: int = 1) -> TrainLoader:
    return train_loader(loader, plan, rank, 0, fuse=fuse, quarantine=None)


@pytest.mark.parametrize(
    ("ranks", "rank", "first_step", "fuse"),
    [(1, 0, 0, 1), (1, 0, 7, 2), (3, 1, 0, 1), (5, 4, 0, 1)],
)
def test_the_same_bits(ranks: int, rank: int, first_step: int, fuse: int) -> None:
    """The last step of an epoch has 7 samples in two micro-batches, so that some ranks have nothing to do."""
    plan = plan_of(ranks=ranks)
    one_by_one = TrainLoader(loader_of(images()), plan, rank, first_step, fuse)
    data = images()
    together = train_loader(
        loader_of(data), plan, rank, first_step, fuse=fuse, quarantine=None
    )
    assert isinstance(together, LookUpLoader)
    assert plan.step(4).has_idle_rank == (ranks > 2)
    data.look_ups.clear()
    micro_batches = 0
    for step in plan.steps(first_step):
        ours, theirs = list(together.step(step)), list(one_by_one.step(step))
        micro_batches += len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.indices == other.indices
            assert mine.samples == other.samples
            assert torch.equal(mine.inputs, other.inputs)
            assert torch.equal(mine.targets, other.targets)
            # As a tensor of its own is, so that every kernel adds in the same order.
            assert mine.inputs.data_ptr() % CACHE_LINE == 0
            assert mine.inputs.stride() == other.inputs.stride()
    assert len(data.look_ups) <= 2 < micro_batches


@pytest.mark.parametrize("max_steps", [None, 13])
def test_ids_of_many_steps_are_those_of_each(max_steps: int | None) -> None:
    plan = plan_of(max_steps=max_steps)
    for first, end in ((0, 1), (0, 5), (3, 7), (2, plan.total_steps), (9, 13)):
        parts = []
        for step in plan.steps(first, end):
            parts += plan.sample_ids(step, 0, len(step.micro_batches)).tolist()
            assert plan.step_size(step.number - 1) == step.size
        assert plan.ids_of_steps(range(first, end)).tolist() == parts


def test_a_look_up_makes_no_plan_of_each_step() -> None:
    """One process takes all samples of a step, so those of many steps are one piece of the epoch's order."""
    steps = 0

    class CountedPlan(Plan):
        def step(self, index: int) -> Step:
            nonlocal steps
            steps += 1
            return super().step(index)

    settings = {"batch_size": 8, "micro_size": 4, "ranks": 1, "epochs": 2, "seed": 1}
    plan = CountedPlan(samples=SAMPLES, **settings)
    loader = train(loader_of(images()), plan)
    loader.peek()
    steps = 0
    loader.step(plan.step(0))
    loader.step(plan.step(1))
    assert steps <= 2 + 2  # the two above, and one of each size


def test_what_a_model_writes_to_its_input_is_no_change_of_another_one() -> None:
    plan = plan_of()
    first, second, *_ = train(loader_of(images()), plan).step(plan.step(0))
    before = second.inputs.clone()
    first.inputs.zero_()
    assert second.inputs._version == 0
    assert torch.equal(second.inputs, before)


def test_a_look_is_not_lost() -> None:
    plan = plan_of()
    loader = train(loader_of(images()), plan)
    looked = loader.peek()
    assert looked is not None
    assert next(iter(loader.step(plan.step(0)))) is looked


@pytest.mark.parametrize(
    ("data", "changes"),
    [
        (images(shape=(1, 3, 3)), {}),  # 36 bytes: would begin within a cache line
        (images(shape=(3, 128, 128)), {}),  # a step has more than the bound
        (images(), {"workers": 1}),
        (images(), {"transforms": [{"name": "RandomHorizontalFlip"}]}),
    ],
)
def test_others_are_loaded_as_before(data: Counted, changes: dict[str, Any]) -> None:
    assert BYTES_AT_ONCE < 24 * 3 * 128 * 128 * 4
    changes = dict(changes)
    loader = loader_of(data, changes.pop("transforms", ()), **changes)
    assert type(train(loader, plan_of())) is TrainLoader
