"""`train.mix` is the same on any number of processes, with any `batch.fuse`, resumed and replayed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.alike import Results, bits, several
from tests.distributed.ranks import on_ranks
from tests.distributed.small import (
    Images,
    config,
    conv_net,
    largest_difference,
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


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    directory = tmp_path_factory.mktemp("reference")
    return directory, on_ranks(1, several, make, directory)[0]


def test_fused_is_what_one_by_one_is(reference: tuple[Path, Results]) -> None:
    _, of_one = reference
    assert largest_difference(of_one.fused, of_one.standard) < 1e-12


@pytest.mark.parametrize(("ranks", "stop"), [(2, 3), (3, 6)])
def test_equal_on_any_ranks_and_resumed_across_the_end_of_mixing(
    tmp_path: Path, reference: tuple[Path, Results], ranks: int, stop: int
) -> None:
    _, of_one = reference
    stopped = tmp_path / "stopped"
    on_ranks(1, bits, make, stopped, stop)
    for of_rank in on_ranks(ranks, several, make, tmp_path, stopped):
        of_rank.assert_alike(of_one)


def test_it_changes_the_run_and_evaluation_is_of_plain_images(
    tmp_path: Path, reference: tuple[Path, Results]
) -> None:
    _, mixed = reference
    plain_bits = on_ranks(1, bits, make, tmp_path, train__mix={})[0]
    assert plain_bits[:2] != mixed.bits[:2]

    def losses() -> list[float]:
        """Before any training, so of the same weights."""
        plain = make(tmp_path / "plain", train__mix={})
        return [
            trainer.evaluate()["loss"] for trainer in (plain, make(tmp_path / "mixed"))
        ]

    plain, with_mix = on_ranks(1, losses)[0]
    assert plain == with_mix


def test_replay_gives_the_digests_and_each_samples_share_of_the_loss(
    tmp_path: Path, reference: tuple[Path, Results]
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
