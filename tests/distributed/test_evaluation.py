"""Every validation sample exactly once, and the same numbers on every rank."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.distributed.ranks import on_ranks
from tests.distributed.small import Images, config, conv_net
from trainer import Trainer
from trainer.core.evaluation import Decision

SAMPLES = 358


def evaluated(
    directory: Path, eval_size: int, workers: int
) -> tuple[dict[str, float], list[Decision]]:
    settings = config(
        directory,
        batch__micro_size=7,
        batch__eval_size=eval_size,
        data__workers=workers,
    )
    trainer = Trainer(
        settings, model=conv_net(), train_data=Images(28), val_data=Images(SAMPLES)
    )
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first == second  # the loader is kept from one to the next
    assert trainer.run.evaluator is not None
    return first, trainer.run.evaluator.decisions()


@pytest.mark.parametrize(
    ("ranks", "eval_size", "workers"),
    [(1, 100, 0), (2, 100, 0), (3, 64, 0), (3, 500, 0), (3, 7, 1)],
)
def test_exact_over_358_samples(
    tmp_path: Path, ranks: int, eval_size: int, workers: int
) -> None:
    data, model = Images(SAMPLES), conv_net().double().eval()
    with torch.no_grad():
        output = model(data.points)
    loss = float(nn.functional.cross_entropy(output, data.labels))
    accuracy = int((output.argmax(1) == data.labels).sum()) / SAMPLES
    results = on_ranks(ranks, evaluated, tmp_path, eval_size, workers)
    for metrics, decisions in results:
        assert metrics["accuracy"] == accuracy
        assert metrics["loss"] == pytest.approx(loss, rel=1e-13)
        assert [d.sample_id for d in decisions] == list(range(SAMPLES))
        assert [d.predicted for d in decisions] == output.argmax(1).tolist()
        assert [d.true for d in decisions] == data.labels.tolist()
    for (one, _), (other, _) in itertools.pairwise(results):
        assert one == other
