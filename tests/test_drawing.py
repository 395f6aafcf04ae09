"""Which samples a run's figures show: the same ones on any number of processes, of all validation samples."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.distributed.ranks import on_ranks
from tests.distributed.small import Images, config, conv_net
from trainer import Trainer
from trainer.core.evaluation import Decision
from trainer.reporting.figures.drawing import confusion, split_by_correctness

NAMES = ("predictions", "saliency", "confusion_matrix")


def test_the_surest_mistakes_and_the_least_sure_hits_come_first() -> None:
    sure = [0.9, 0.3, 0.99, 0.6, 0.3, 0.99]
    decisions = [Decision(i, i % 2, 0, share) for i, share in enumerate(sure)]
    wrong, right = split_by_correctness(decisions)
    assert [decision.sample_id for decision in wrong] == [5, 3, 1]
    assert [decision.sample_id for decision in right] == [4, 0, 2]
    assert torch.equal(confusion(decisions, None), torch.tensor([[3, 3], [0, 0]]))


def test_the_same_pictures_on_any_number_of_processes(tmp_path: Path) -> None:
    def pictures(ranks: int) -> list[bytes]:
        def run() -> None:
            settings = config(
                tmp_path / str(ranks),
                run__figures=True,
                run__reproducibility="bitwise",
                batch__micro_size=7,
                batch__eval_size=16,
            )
            Trainer(settings, model=conv_net(), train_data=Images(), val_data=Images(90)).fit()

        on_ranks(ranks, run)
        return [(tmp_path / f"{ranks}/run/figures/{name}.png").read_bytes() for name in NAMES]

    assert pictures(1) == pictures(3)
