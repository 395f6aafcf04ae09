"""`replay`: a step of a run on several processes, done over on one, is that very step; and it tells the truth of it."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from tests.distributed.ranks import on_ranks
from tests.distributed.small import Images, config, conv_net
from tests.programs import run_program
from trainer import ConfigError, Task, Trainer, WeightedSum
from trainer.inspection.replay import replay


def make(directory: Path, **changes: Any) -> Trainer:
    settings = config(
        directory,
        run__reproducibility="bitwise",
        batch__micro_size=5,
        train__max_grad_norm=0.5,
        train__log_every=2,
        train__checkpoint_every=3,
        train__keep_checkpoints=9,
        **changes,
    )
    return Trainer(settings, model=conv_net(), train_data=Images(), val_data=Images(28))


def fit(directory: Path, **changes: Any) -> None:
    make(directory, **changes).fit()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs")
    on_ranks(3, fit, directory)
    return directory / "run"


@pytest.mark.parametrize("number", [1, 3, 4, 6, 8])
def test_a_step_on_three_ranks_is_the_step_on_one(
    run: Path, tmp_path: Path, number: int
) -> None:
    """103 samples by 28: epochs of 4 steps, the last of 19; checkpoints after 3, 4, 6, 8."""
    result = replay(lambda: make(tmp_path), run, number)
    assert result.step == result.asked == number
    assert result.began_after == max(step for step in (0, 3, 4, 6, 8) if step < number)
    assert all(was == now for was, now in result.digests.values())
    assert all(was == now for was, now in result.logged.values())
    if number % 2 == 0:
        assert number in result.digests
        assert set(result.logged) == {"train/loss", "lr", "grad_norm"}
        assert result.grad_norm == result.logged["grad_norm"][0]
    assert (
        len(result.samples)
        == len({sample["id"] for sample in result.samples})
        == (19 if number % 4 == 0 else 28)
    )


def test_what_it_says_is_what_happened(run: Path, tmp_path: Path) -> None:
    """Step 4, from the weights of checkpoint 3: losses, statistics, gradient and change computed by hand."""
    result = replay(lambda: make(tmp_path), run, 4)
    before, after = (
        load_file(run / "checkpoints" / f"step_0000000{step}" / "model.safetensors")
        for step in (3, 4)
    )
    net, data = conv_net().double(), Images()
    net.load_state_dict(before)
    means, total = [], torch.zeros((), dtype=torch.float64)
    for micro_batch in sorted({sample["micro_batch"] for sample in result.samples}):
        batch_samples = [
            sample for sample in result.samples if sample["micro_batch"] == micro_batch
        ]
        ids = [sample["id"] for sample in batch_samples]
        hidden = net[0](data.points[ids])
        means.append(hidden.mean((0, 2, 3)))
        losses = F.cross_entropy(net[1:](hidden), data.labels[ids], reduction="none")
        assert [sample["loss"] for sample in batch_samples] == pytest.approx(
            losses.tolist(), rel=1e-12
        )
        assert [sample["target"] for sample in batch_samples] == [
            "abcd"[data.labels[i]] for i in ids
        ]
        total = total + losses.sum() / len(result.samples)
    assert result.loss == pytest.approx(total.item(), rel=1e-12)
    statistics = result.batch_norm["1"]
    assert statistics["least_mean"] == pytest.approx(
        torch.stack(means).min().item(), rel=1e-9
    )
    assert statistics["largest_mean"] == pytest.approx(
        torch.stack(means).max().item(), rel=1e-9
    )
    total.backward()
    norm = math.sqrt(
        sum(
            p.grad.square().sum().item() for p in net.parameters() if p.grad is not None
        )
    )
    assert result.grad_norm == pytest.approx(norm, rel=1e-9)
    for name, numbers in result.weights.items():
        assert numbers["change"] == pytest.approx(
            (after[name] - before[name]).norm().item(), rel=1e-9
        )


def test_a_step_that_is_none_of_the_run(run: Path, tmp_path: Path) -> None:
    for number in (0, 9):
        with pytest.raises(ConfigError, match="1 to 8"):
            replay(lambda: make(tmp_path), run, number)


def test_a_run_without_a_finite_loss_says_how_to_look_at_it(tmp_path: Path) -> None:
    settings = [
        "optimizer.lr=1e30",
        "train.log_every=20",
        "wandb.mode=disabled",
        "run.figures=false",
    ]
    failed = run_program(["train.py", f"run.dir={tmp_path}", *settings])
    assert failed.returncode == 1
    (replay_command,) = (
        line.split() for line in failed.stderr.splitlines() if "replay" in line
    )
    # The first such step, though the row is that of step 20.
    first_bad_step = int(replay_command[-1])
    assert 1 < first_bad_step < 20
    replay_command[-1] = "20"
    output = run_program([*replay_command[1:], "--json"])
    assert output.returncode == 0, output.stderr
    report = json.loads(output.stdout)
    assert report["asked"] == 20
    assert report["step"] == first_bad_step
    assert not math.isfinite(report["loss"])
    directory = tmp_path / "digits" / "replay" / f"step_{report['step']:08d}"
    assert {path.name for path in directory.iterdir()} == {"replay.json", "images.png"}
    assert "is not finite already in step" in run_program([*replay_command[1:]]).stdout


@pytest.mark.parametrize(
    ("every_steps", "checkpoint_every", "halvings"), [(None, None, 4), (3, 15, 8)]
)
def test_a_plateau_schedule_goes_by_the_evaluations_that_the_run_logged(
    tmp_path: Path,
    every_steps: int | None,
    checkpoint_every: int | None,
    halvings: int,
) -> None:
    """A replay passes evaluations, and evaluates nothing.

    The checkpoints of epochs 1 to 5 are gone; or one is of step 15, whose evaluation within an epoch is still to come.
    """

    def make(directory: Path) -> Trainer:
        settings = config(
            directory,
            train__epochs=6,
            train__evaluate_every_steps=every_steps,
            train__checkpoint_every=checkpoint_every,
            train__checkpoint_every_epochs=6,
            train__keep_checkpoints=2,
            schedule__name="plateau",
            schedule__patience=0,
            schedule__factor=0.5,
            schedule__threshold=1.0,
        )
        data = {"train_data": Images(), "val_data": Images(28)}
        return Trainer(settings, model=conv_net(), **data)

    make(tmp_path).fit()
    result = replay(lambda: make(tmp_path / "again"), tmp_path / "run", 18)
    assert result.began_after == (checkpoint_every or 0)
    assert result.learning_rate == 0.1 * 0.5**halvings  # at each evaluation
    assert len(result.digests) == 18 - result.began_after
    assert all(was == now for was, now in result.digests.values())


class OneNotFinite(Images):
    """One sample is NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.points[7] = math.nan


def test_a_step_after_one_that_the_run_left_out(tmp_path: Path) -> None:
    """With train.non_finite=skip the run went on, and so does a replay."""

    def make(directory: Path) -> Trainer:
        settings = config(
            directory, train__non_finite="skip", train__keep_checkpoints=1
        )
        return Trainer(settings, model=conv_net(), train_data=OneNotFinite())

    make(tmp_path).fit()
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    bad_steps = [
        r["step"] for r in map(json.loads, rows) if r.get("skipped_steps") == 2
    ]
    number = bad_steps[0] + 1  # the sample has come twice, once in each epoch
    result = replay(lambda: make(tmp_path / "again"), tmp_path / "run", number)
    assert result.step == result.asked == number
    assert math.isfinite(result.loss)
    assert len(result.digests) == number
    assert all(was == now for was, now in result.digests.values())


class Masks(Images):
    """Every image with a mask of its size, 5 × 5."""

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        image, label = super().__getitem__(i)
        mask = torch.zeros(5, 5, dtype=torch.int64)
        mask[0, 0] = label
        return image, mask


class Contrast(Task):
    """Each sample against the others of its micro-batch: one alone has nothing to be compared with."""

    def loss_sum(self, output: torch.Tensor, targets: torch.Tensor) -> WeightedSum:
        own = torch.arange(len(output))
        return WeightedSum(
            F.cross_entropy(output @ output.T, own, reduction="sum"), len(output)
        )


@pytest.mark.parametrize(
    ("model", "parts", "target", "has_losses"),
    [
        (nn.Conv2d(2, 4, 1), {"train_data": Masks()}, "int64 5 × 5, 0 to ", True),
        (conv_net(), {"train_data": Images(), "task": Contrast()}, "", False),
    ],
)
def test_samples_of_other_tasks(
    tmp_path: Path, model: nn.Module, parts: Any, target: str, has_losses: bool
) -> None:
    """A mask is one line. A loss that compares samples has no part for each, where each alone would give 0."""

    def make() -> Trainer:
        settings = config(tmp_path, train__max_steps=1)
        return Trainer(settings, model=copy.deepcopy(model), **parts)

    make().fit()
    samples = replay(make, tmp_path / "run", 1).samples
    assert all(str(sample["target"]).startswith(target) for sample in samples)
    assert all((sample["loss"] is not None) == has_losses for sample in samples)
