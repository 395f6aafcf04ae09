"""Which samples a run's figures show: the same ones on any number of processes, of all validation samples."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np

from tests.distributed.ranks import on_ranks
from tests.distributed.small import Images, config, conv_net
from trainer import Trainer
from trainer.core.evaluation import Decision
from trainer.reporting.figures.confusion import class_table, count_decisions
from trainer.reporting.figures.drawing import split_by_correctness

NAMES = ("predictions", "saliency", "confusion_matrix")


def decisions_of(pairs: list[tuple[int, int]]) -> list[Decision]:
    """Decisions from (true, predicted) pairs."""
    return [
        Decision(i, predicted, true, 0.5) for i, (true, predicted) in enumerate(pairs)
    ]


def test_the_most_confident_mistakes_and_the_least_confident_hits_come_first() -> None:
    confidences = [0.9, 0.3, 0.99, 0.6, 0.3, 0.99]
    decisions = [
        Decision(i, i % 2, 0, confidence) for i, confidence in enumerate(confidences)
    ]
    wrong, right = split_by_correctness(decisions)
    assert [decision.sample_id for decision in wrong] == [5, 3, 1]
    assert [decision.sample_id for decision in right] == [4, 0, 2]


def test_decisions_are_counted_by_true_class_in_rows() -> None:
    decisions = decisions_of([(0, 0), (0, 1), (0, 1), (2, 1)])
    np.testing.assert_array_equal(
        count_decisions(decisions), [[1, 2, 0], [0, 0, 0], [0, 1, 0]]
    )
    assert count_decisions(decisions, classes=5).shape == (5, 5)
    assert count_decisions(decisions_of([(0, 7)]), classes=5).shape == (8, 8)


def test_the_table_has_every_class_with_samples_and_what_it_is_confused_with() -> None:
    decisions = decisions_of(
        [(0, 0), (0, 0), (0, 1), (1, 1), (1, 0), (1, 3), (1, 3), (2, 2)]
    )
    table = class_table(
        decisions, count_decisions(decisions, 4), ["cat", "dog, old", "owl", "fox"]
    )
    rows = list(csv.DictReader(io.StringIO(table)))
    assert [row["class"] for row in rows] == ["cat", "dog, old", "owl"]
    assert [row["precision"] for row in rows] == ["0.666667", "0.5", "1.0"]
    assert [row["recall"] for row in rows] == ["0.666667", "0.25", "1.0"]
    assert [row["f1"] for row in rows] == ["0.666667", "0.333333", "1.0"]
    assert [row["support"] for row in rows] == ["3", "4", "1"]
    assert [row["most confused with"] for row in rows] == ["dog, old", "fox", ""]
    assert [row["times"] for row in rows] == ["1", "2", "0"]


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
            Trainer(
                settings, model=conv_net(), train_data=Images(), val_data=Images(90)
            ).fit()

        on_ranks(ranks, run)
        return [
            (tmp_path / f"{ranks}/run/figures/{name}.png").read_bytes()
            for name in NAMES
        ]

    assert pictures(1) == pictures(3)
