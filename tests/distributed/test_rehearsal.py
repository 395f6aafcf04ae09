"""What only an epoch's end needs is tried before the first step; an evaluation that fails costs no trained step."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.ranks import on_ranks
from tests.distributed.small import (
    CLASSES,
    Images,
    Points,
    config,
    conv_net,
    mlp,
    rows_of,
    state,
)
from trainer import ConfigError, DataError, LockstepError, Observer, Trainer
from trainer.process import launcher
from trainer.storage import checkpoint


def failure(directory: Path, kind: type[LockstepError], **parts: Any) -> str:
    """The message of a run that must fail before its first row."""
    settings = config(directory, **parts.pop("changes", {}))
    with pytest.raises(kind) as caught:
        Trainer(settings, **parts).fit()
    metrics = directory / "run" / "metrics.jsonl"
    assert not metrics.exists() or not metrics.read_text()
    return str(caught.value)


def net_that_needs_two() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_epoch_that_ends_with_a_single_sample(tmp_path: Path, ranks: int) -> None:
    """57 samples by 28: the third step of an epoch has one sample."""
    messages = on_ranks(
        ranks,
        failure,
        tmp_path,
        ConfigError,
        model=net_that_needs_two(),
        train_data=Points(57, ignored=False),
        changes={"batch__micro_size": 14},
    )
    assert set(messages) == {messages[0]}
    assert "batch.micro_size: a micro-batch of one sample" in messages[0]


def test_a_run_that_ends_before_the_single_sample_goes_on(tmp_path: Path) -> None:
    settings = config(tmp_path, train__max_steps=2)
    data = Points(57, ignored=False)
    summary = Trainer(settings, model=net_that_needs_two(), train_data=data).fit()
    assert summary["steps"] == 2


class WithAnOddImage(Images):
    """One image is larger."""

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image, label = super().__getitem__(i)
        return (image if i != 27 else torch.zeros(2, 7, 7).double()), label


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_validation_image_of_another_size(tmp_path: Path, ranks: int) -> None:
    messages = on_ranks(
        ranks,
        failure,
        tmp_path,
        LockstepError,
        model=conv_net(),
        train_data=Images(56),
        val_data=WithAnOddImage(28),
        changes={"batch__micro_size": 7, "batch__eval_size": 10},
    )
    assert len(set(messages)) == 1
    assert "(2, 7, 7)" in messages[0]


class Unsavable(Observer):
    def state_dict(self) -> dict[str, Any]:
        return {"when": print}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        pass


def test_a_state_that_no_checkpoint_can_keep(tmp_path: Path) -> None:
    message = failure(
        tmp_path,
        LockstepError,
        model=mlp(),
        train_data=Points(ignored=False),
        observers=[Unsavable()],
    )
    assert 'the state of "Unsavable" cannot be saved: "when" is' in message


def test_a_disk_without_room_for_one_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 100))
    message = failure(
        tmp_path, ConfigError, model=mlp(), train_data=Points(ignored=False)
    )
    assert message.startswith("run.dir: the disk of")


def test_a_rehearsal_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights(directory: Path) -> dict[str, Tensor]:
        net = nn.Sequential(*conv_net(), nn.Dropout(0.3))
        trainer = Trainer(
            config(directory, batch__micro_size=5),
            model=net,
            train_data=Images(),
            val_data=Images(40),
        )
        trainer.fit()
        return state(trainer)

    expected = weights(tmp_path / "with")
    monkeypatch.setattr("trainer.core.try_out.rehearse", lambda run: None)
    actual = weights(tmp_path / "without")
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


# ---------------------------------------------------------------- an evaluation that fails


class Breakable(Images):
    """Sample 7 of 40, which is none of those that are rehearsed, may fail."""

    def __init__(self, is_broken: bool) -> None:
        super().__init__(40)
        self.is_broken = is_broken

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if self.is_broken and i == 7:
            raise DataError("sample 7 cannot be read")
        return super().__getitem__(i)


def fit(directory: Path, *, is_broken: bool = False) -> dict[str, Tensor]:
    settings = config(
        directory,
        run__reproducibility="bitwise",
        run__resume="auto",
        batch__micro_size=7,
        batch__eval_size=40,
        train__epochs=3,
        schedule__name="plateau",
        schedule__patience=0,
        model__freeze=["1"],
        model__unfreeze={2: ["1"]},
    )
    trainer = Trainer(
        settings,
        model=conv_net(),
        train_data=Images(),
        val_data=Breakable(is_broken),
    )
    trainer.fit()
    return state(trainer)


def fit_broken(directory: Path) -> None:
    """The sample is rank 0's; another rank sees that rank 0 is gone."""
    with pytest.raises((LockstepError, RuntimeError)) as caught:
        fit(directory, is_broken=True)
    assert isinstance(caught.value, DataError) == (launcher.rank() == 0)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 1), (1, 3)])
def test_an_epoch_whose_evaluation_failed_is_not_trained_again(
    tmp_path: Path, before: int, after: int
) -> None:
    """Mended and resumed, on other ranks too, the run ends with the weights and the rows of one that never failed."""
    straight = fit(tmp_path / "straight")
    broken = tmp_path / "broken"
    on_ranks(before, fit_broken, broken)
    newest = checkpoint.latest(broken / "run" / "checkpoints")
    assert newest is not None
    assert newest.name == "step_00000004"  # the first epoch's last
    resumed = on_ranks(after, fit, broken)[0]
    for name, value in straight.items():
        assert torch.equal(resumed[name], value), name
    assert rows_of(broken / "run") == rows_of(tmp_path / "straight" / "run")
