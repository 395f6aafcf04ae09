"""Frozen and thawed parts: equal to a loop by hand, on any number of ranks, through any stop; features once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.distributed.ranks import on_ranks
from tests.distributed.small import (
    CLASSES,
    Images,
    config,
    fitted,
    largest_difference,
    state,
)
from trainer import Trainer
from trainer.exact.plan import Plan

# The last of an epoch's 5 steps has 2 micro-batches, the others 3.
SAMPLES, SIZE = 56, 12


def net() -> nn.Sequential:
    """Two blocks with BatchNorm, dropout in the second, and a head."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh()),
        nn.Sequential(
            nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Dropout(0.3)
        ),
        nn.Flatten(),
        nn.Linear(36, CLASSES),
    )


def run(
    directory: Path, **changes: Any
) -> tuple[dict[str, Tensor], dict[str, float], list[str]]:
    """Weights; the numbers of another evaluation at the end; the parameters with a momentum."""
    more = {
        "batch__size": SIZE,
        "batch__micro_size": 4,
        "train__epochs": 4,
        "model__freeze": "backbone",
        **changes,
    }
    trainer = fitted(
        config(directory, **more),
        net(),
        train_data=Images(SAMPLES),
        val_data=Images(31),
    )
    momenta = [
        n for n, p in trainer.module.named_parameters() if p in trainer.optimizer.state
    ]
    return state(trainer), trainer.evaluate(), momenta


def by_hand(thaws: dict[int, int]) -> dict[str, Tensor]:
    """`thaws`: epochs done → how many blocks are frozen from then on. One micro-batch a step, without dropout."""
    model = net().double()
    model[1][3].p = 0.0
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    data, plan = Images(SAMPLES), Plan(SAMPLES, SIZE, SIZE, 1, 4, seed=0)
    frozen = 2
    for step in plan.steps():
        frozen = thaws.get(step.epoch, frozen)
        model.train()
        for block in model[:frozen]:
            block.eval()
        ids = torch.from_numpy(plan.sample_ids(step, 0))
        optimizer.zero_grad()
        F.cross_entropy(model(data.points[ids]), data.labels[ids]).backward()
        for block in model[:frozen]:
            block.zero_grad()
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("unfreeze", [{}, {"1": ["1"], "3": "backbone"}])
def test_a_loop_by_hand_arrives_at_the_same(
    tmp_path: Path, unfreeze: dict[str, Any]
) -> None:
    def ours() -> dict[str, Tensor]:
        model = net()
        model[1][3].p = 0.0
        section = {
            "batch__size": SIZE,
            "train__epochs": 4,
            "model__freeze": "backbone",
            "model__unfreeze": unfreeze,
        }
        return state(
            fitted(
                config(tmp_path, **section),
                model,
                train_data=Images(SAMPLES),
                val_data=Images(31),
            )
        )

    reached = by_hand({1: 1, 3: 0} if unfreeze else {})
    assert largest_difference(on_ranks(1, ours)[0], reached) < 1e-12
    if not unfreeze:
        assert all(
            torch.equal(reached[k], v)
            for k, v in net().double().state_dict().items()
            if k[:2] != "3."
        )


UNFREEZE = {
    "model__unfreeze": {"1": ["1"], "3": ["0.0"]},
    "batch_norm__momentum_per": "step",
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return {
        mode: on_ranks(
            1,
            run,
            tmp_path_factory.mktemp("straight"),
            run__reproducibility=mode,
            **UNFREEZE,
        )[0]
        for mode in ("standard", "bitwise")
    }


@pytest.mark.parametrize("mode", ["standard", "bitwise"])
@pytest.mark.parametrize("stops", [[(1, 5), (2, None)], [(2, 17), (1, None)]])
def test_gradual_unfreezing_on_any_ranks(
    tmp_path: Path, straight: Any, mode: str, stops: list[tuple[int, int | None]]
) -> None:
    """Epochs have 5 steps: stops at a boundary where a part is thawed, and within the epoch after it."""
    weights, numbers, momenta = straight[mode]
    thawed = [
        "0.0.weight",
        "0.0.bias",
        "1.0.weight",
        "1.0.bias",
        "1.1.weight",
        "1.1.bias",
    ]
    assert momenta == [*thawed, "3.weight", "3.bias"]
    for ranks, stop in stops:
        more = {
            "run__reproducibility": mode,
            "run__resume": "auto",
            "train__max_steps": stop,
            **UNFREEZE,
        }
        results = on_ranks(ranks, run, tmp_path, **more)
    for got, got_numbers, got_momenta in results:
        assert got_momenta == momenta
        if mode == "bitwise":
            assert all(torch.equal(got[k], v) for k, v in weights.items())
            assert got_numbers == numbers
        assert largest_difference(got, weights) < 1e-12
        assert got_numbers == pytest.approx(numbers, rel=1e-10)


@pytest.mark.parametrize("unfreeze", [{}, {"2": ["1"]}])
def test_features_of_validation_samples_are_made_once(
    tmp_path: Path, unfreeze: dict[str, Any]
) -> None:
    """Each evaluation gives, bit for bit, what running the whole model gives; a thawed backbone is run again."""

    def both() -> tuple[list[dict[str, float]], list[dict[str, float]], int]:
        calls = 0

        def count(module: nn.Module, *_: Any) -> None:
            nonlocal calls
            calls += not module.training and not torch.is_grad_enabled()

        class Twice(Trainer):
            def evaluate(self) -> dict[str, float]:
                assert self.run.evaluator is not None
                cached.append(super().evaluate())
                handle = self.module[0].register_forward_hook(count)
                self.run.evaluator.evaluate()
                handle.remove()
                self.run.evaluator.forget()
                # This keeps the features for the next one.
                whole.append(self.run.evaluator.evaluate())
                return cached[-1]

        cached: list[dict[str, float]] = []
        whole: list[dict[str, float]] = []
        section = {
            "batch__size": SIZE,
            "train__epochs": 3,
            "model__freeze": "backbone",
            "model__unfreeze": unfreeze,
        }
        settings = config(tmp_path, batch__eval_size=8, batch__micro_size=4, **section)
        trainer = Twice(
            settings, model=net(), train_data=Images(SAMPLES), val_data=Images(31)
        )
        trainer.fit()
        trainer._freeze(0)  # what was thawed is another backbone now
        trainer.evaluate()
        return cached, whole, calls

    for cached, whole, calls in on_ranks(2, both):
        assert cached == whole
        assert len(cached) == 4
        # This rank's two batches, in the last epoch.
        assert calls == (2 if unfreeze else 0)
