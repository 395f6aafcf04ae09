"""`train.mix` is the same on any number of processes, with any `batch.fuse`, resumed and replayed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import on_ranks
from tests.distributed.small import (
    HASHES,
    Images,
    config,
    conv_net,
    largest_difference,
    state,
)
from trainer import Trainer
from trainer.inspection.replay import replay

# Of 8 steps, 5 are mixed: the last step of the first epoch is short, with micro-batches of four and five.
MIX = {"mixup": 0.4, "cutmix": 1.0, "prob": 0.9, "off_after": 0.7}


def make(directory: Path, stop: int | None = None, **changes: Any) -> Trainer:
    settings = config(
        directory,
        **{
            "run__resume": "auto",
            "run__reproducibility": "bitwise",
            "train__mix": MIX,
            "loss__class_weights": [1.0, 2.0, 0.5, 1.5],
            "batch__micro_size": 5,
            **changes,
        },
    )
    if stop is not None:
        settings = replace(settings, train=replace(settings.train, stop_after=stop))
    return Trainer(settings, model=conv_net(), train_data=Images(), val_data=Images(28))


def bits(directory: Path, stop: int | None = None, **changes: Any) -> list[Any]:
    trainer = make(directory, stop, **changes)
    summary = trainer.fit()
    return [summary[name] for name in HASHES] + trainer.progress.history


def standard(directory: Path, **changes: Any) -> Any:
    trainer = make(directory, run__reproducibility="standard", **changes)
    trainer.fit()
    return state(trainer)


def several(directory: Path, stopped: Path | None) -> Any:
    result = [
        bits(directory / "bits"),
        standard(directory / "standard"),
        standard(directory / "fused", batch__fuse=3),
    ]
    if stopped is not None:
        result.append(bits(stopped))
    return result


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp("reference")
    return directory, on_ranks(1, several, directory, None)[0]


def test_fused_is_what_one_by_one_is(reference: tuple[Path, Any]) -> None:
    _, (_, one_by_one, fused) = reference
    assert largest_difference(fused, one_by_one) < 1e-12


@pytest.mark.parametrize(("ranks", "stop"), [(2, 3), (3, 6)])
def test_equal_on_any_ranks_and_resumed_across_the_end_of_mixing(
    tmp_path: Path, reference: tuple[Path, Any], ranks: int, stop: int
) -> None:
    _, (of_one, one_by_one, _) = reference
    stopped = tmp_path / "stopped"
    on_ranks(1, bits, stopped, stop)
    for of_rank in on_ranks(ranks, several, tmp_path, stopped):
        exact, apart, fused, resumed = of_rank
        assert exact == of_one
        assert resumed == of_one
        assert largest_difference(apart, one_by_one) < 1e-12
        assert largest_difference(fused, one_by_one) < 1e-12


def test_it_changes_the_run_and_evaluation_is_of_plain_images(
    tmp_path: Path, reference: tuple[Path, Any]
) -> None:
    _, (mixed, _, _) = reference
    assert on_ranks(1, bits, tmp_path, train__mix={})[0][:2] != mixed[:2]

    def losses() -> list[float]:
        """Before any training, so of the same weights."""
        plain = make(tmp_path / "plain", train__mix={})
        return [
            trainer.evaluate()["loss"] for trainer in (plain, make(tmp_path / "mixed"))
        ]

    plain, with_mix = on_ranks(1, losses)[0]
    assert plain == with_mix


def test_replay_gives_the_digests_and_each_samples_share_of_the_loss(
    tmp_path: Path, reference: tuple[Path, Any]
) -> None:
    directory, _ = reference

    def details() -> Any:
        result = replay(lambda: make(tmp_path), directory / "bits" / "run", 4)
        losses = [sample["loss"] for sample in result.samples]
        return result.digests, result.logged, result.loss, losses

    digests, logged, loss, losses = on_ranks(1, details)[0]
    assert digests
    assert all(was == now for was, now in digests.values())
    assert all(was == now for was, now in logged.values())
    # The last step of the first epoch. Their sum is checked against the micro-batches' (`MicroBatchRecord`).
    assert len(losses) == 103 - 3 * 28
    assert None not in losses
    assert loss == pytest.approx(logged["train/loss"][0])
