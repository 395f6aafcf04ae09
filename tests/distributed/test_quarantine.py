"""`data.bad_samples=quarantine`: what cannot be read is left out, the same on any number of processes."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.distributed.ranks import on_ranks
from tests.distributed.small import (
    HASHES,
    SAMPLES,
    Images,
    config,
    conv_net,
    largest_difference,
    rows_of,
    state,
)
from trainer import DataError, Trainer
from trainer.exact.plan import Plan

SIZE, MICRO, EPOCHS = 28, 4, 2
# With batches of two, there is one of which no sample remains.
BAD_VAL = frozenset({0, 1, 20})
RESULTS = (*HASHES, "best", "samples_seen", "bad_samples", "steps")


def plan() -> Plan:
    return Plan(
        samples=SAMPLES,
        batch_size=SIZE,
        micro_size=MICRO,
        ranks=1,
        epochs=EPOCHS,
        seed=0,
    )


def bad_in_training() -> frozenset[int]:
    """In the first epoch: all that the last of three ranks has of step 1, a few of steps 2 and 3, all of step 4."""
    the_plan = plan()
    order = the_plan.permutation(0).tolist()
    all_of_last_rank = order[20:SIZE]
    some = [order[SIZE], order[SIZE + 1], order[SIZE + 9]]
    return frozenset([*all_of_last_rank, *some, order[60], *order[3 * SIZE :]])


class Damaged(Images):
    """Some samples cannot be read, one after the other for a reason of its own kind."""

    def __init__(self, samples: int, bad: Collection[int]) -> None:
        super().__init__(samples)
        self.paths = [f"images/{i}.png" for i in range(samples)]
        self.bad = frozenset(bad)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if i in self.bad:
            raise [ValueError, KeyError, OSError][i % 3](f"no\nimage {i}")
        return super().__getitem__(i)


def make(
    directory: Path,
    bad: Collection[int],
    bad_val: Collection[int] = BAD_VAL,
    **changes: Any,
) -> Trainer:
    settings = config(
        directory,
        **{
            "batch__micro_size": MICRO,
            "batch__eval_size": 2,
            "train__epochs": EPOCHS,
            "data__bad_samples": "quarantine",
            "data__max_bad": 80,
            **changes,
        },
    )
    return Trainer(
        settings,
        model=conv_net(),
        train_data=Damaged(SAMPLES, bad),
        val_data=Damaged(50, bad_val),
    )


def fit(
    directory: Path, bad: Collection[int], **changes: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    trainer = make(directory, bad, **changes)
    summary = trainer.fit()
    return {key: summary[key] for key in RESULTS}, state(trainer)


def by_hand(bad: Collection[int]) -> tuple[dict[str, Tensor], list[float]]:
    """Weights and statistics, and each step's loss, of a plain loop that has never heard of the bad samples."""
    data, model = Images(SAMPLES), conv_net().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in plan().steps():
        parts = []
        for index in range(len(step.micro_batches)):
            ids = plan().sample_ids(step, index).tolist()
            parts.append([i for i in ids if i not in bad])
        count = sum(map(len, parts))
        optimizer.zero_grad()
        total = 0.0
        for ids in filter(None, parts):
            output = model(data.points[ids])
            loss = F.cross_entropy(output, data.labels[ids], reduction="sum") / count
            loss.backward()
            total += loss.item()
        if count:
            optimizer.step()
            losses.append(total)
    return model.state_dict(), losses


def validation_loss(weights: dict[str, Tensor]) -> float:
    data, model = Images(50), conv_net().double()
    model.load_state_dict(weights)
    good = [i for i in range(50) if i not in BAD_VAL]
    return F.cross_entropy(model.eval()(data.points[good]), data.labels[good]).item()


def listed(directory: Path) -> str:
    return (directory / "run" / "bad_samples.txt").read_text()


BITWISE = {
    "run__reproducibility": "bitwise",
    "loss__class_weights": [1.0, 0.2, 3.0, 0.7],
    "batch_norm__momentum_per": "step",
    # In the middle of the first epoch, of which the samples to come are not known yet.
    "batch_norm__recalibrate": 3,
    "batch_norm__recalibrate_at": "end",
}


def both_modes(directory: Path, bad: Collection[int], fuse: int, workers: int) -> Any:
    exact = fit(directory / "exact", bad, data__workers=workers, **BITWISE)
    standard = fit(directory / "standard", bad, batch__fuse=fuse, data__workers=workers)
    return exact, standard


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp("straight")
    (results,) = on_ranks(1, both_modes, directory, bad_in_training(), 3, 2)
    return directory, results


def test_equals_a_loop_without_the_bad_samples(straight: tuple[Path, Any]) -> None:
    directory, (_, (summary, weights)) = straight
    expected, losses = by_hand(bad_in_training())
    assert largest_difference(weights, expected) < 1e-12
    logged = rows_of(directory / "standard" / "run")
    train_losses = [row["train/loss"] for row in logged if "train/loss" in row]
    assert train_losses == pytest.approx(losses, rel=1e-12)
    assert logged[-1]["val/loss"] == pytest.approx(validation_loss(expected))
    bad = len(bad_in_training())
    assert summary["samples_seen"] == EPOCHS * (SAMPLES - bad)
    assert summary["bad_samples"] == logged[-1]["quarantined"] == bad + len(BAD_VAL)


def test_a_first_step_without_samples(tmp_path: Path) -> None:
    bad = plan().permutation(0)[:SIZE].tolist()
    expected, _ = by_hand(bad)
    for summary, weights in on_ranks(2, fit, tmp_path, bad):
        assert largest_difference(weights, expected) < 1e-12
        assert summary["steps"] == 8
    assert "train/loss" not in rows_of(tmp_path / "run")[0]


@pytest.mark.parametrize(("ranks", "fuse", "workers"), [(2, 2, 0), (3, 1, 1)])
def test_any_number_of_processes(
    tmp_path: Path, straight: tuple[Path, Any], ranks: int, fuse: int, workers: int
) -> None:
    """Three ranks: the last has nothing to do in the very first step. One and two: micro-batches of unequal size."""
    directory, ((summary, weights), (_, standard_weights)) = straight
    results = on_ranks(ranks, both_modes, tmp_path, bad_in_training(), fuse, workers)
    for (exact_summary, exact_weights), (_, others) in results:
        assert exact_summary == summary
        assert all(torch.equal(exact_weights[k], weights[k]) for k in weights)
        assert largest_difference(others, standard_weights) < 1e-12
    assert rows_of(tmp_path / "exact" / "run") == rows_of(directory / "exact" / "run")
    assert listed(tmp_path / "exact") == listed(directory / "exact")


def test_a_resume_leaves_out_the_same(
    tmp_path: Path, straight: tuple[Path, Any]
) -> None:
    """The run loses its newest checkpoint, and meanwhile all files are repaired: what was decided stays decided."""
    directory, ((summary, _), _) = straight
    settings = {
        **BITWISE,
        "run__resume": "auto",
        "train__checkpoint_every": 2,
        "train__keep_checkpoints": 9,
    }
    on_ranks(2, fit, tmp_path, bad_in_training(), train__stop_after=5, **settings)
    checkpoints = tmp_path / "run" / "checkpoints"
    for name in ("step_00000004", "step_00000005"):
        shutil.rmtree(checkpoints / name)
    (checkpoints / "last").write_text("step_00000002\n")
    results = on_ranks(3, fit, tmp_path, (), bad_val=(), **settings)
    assert [result[0] for result in results] == [summary] * 3
    assert listed(tmp_path) == listed(directory / "exact")
    assert rows_of(tmp_path / "run") == rows_of(directory / "exact" / "run")


def test_what_the_end_of_a_session_finds_is_found_again(
    tmp_path: Path, straight: tuple[Path, Any]
) -> None:
    """It evaluates once more than the run as a whole."""
    directory, _ = straight
    settings = {**BITWISE, "run__resume": "auto"}
    on_ranks(1, fit, tmp_path, bad_in_training(), train__stop_after=2, **settings)
    assert "\tval\t" in listed(tmp_path)
    on_ranks(2, fit, tmp_path, bad_in_training(), **settings)
    assert listed(tmp_path) == listed(directory / "exact")
    assert rows_of(tmp_path / "run") == rows_of(directory / "exact" / "run")


def refusal(directory: Path, bad: Collection[int], **changes: Any) -> str:
    try:
        make(directory, bad, **changes).fit()
    except DataError as error:
        return str(error)
    return "accepted"


def three_refusals(directory: Path) -> list[str]:
    order = plan().permutation(0).tolist()
    bad = [order[3], order[5], order[SIZE + 7]]
    return [
        refusal(directory / "more", bad, data__max_bad=2),
        refusal(directory / "stop", bad[:1], data__bad_samples="stop", bad_val=()),
        # All of them: the reason is not that there are many.
        refusal(directory / "all", range(SAMPLES)),
    ]


def test_too_many_end_the_run(tmp_path: Path) -> None:
    order = plan().permutation(0).tolist()
    last = order[SIZE + 7]
    more, others = on_ranks(2, three_refusals, tmp_path)
    for message in (more[0], others[0]):
        file = tmp_path / "more" / "run" / "bad_samples.txt"
        assert message.startswith(
            f"3 samples cannot be used, more than data.max_bad=2; {file} lists them; the last is "
            f"train sample {last} (images/{last}.png): "
        )
        assert len(file.read_text().splitlines()) == 4
    assert f"train sample {order[3]} (images/{order[3]}.png)" in more[1] + others[1]
    assert "train sample 0 (images/0.png): ValueError: no image 0" in more[2]
    assert more[2] == others[2]
