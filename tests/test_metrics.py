"""Sums that neither order nor grouping can change."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.distributed.ranks import on_ranks
from tests.operations import Operations
from trainer.components.task import build_task
from trainer.config.model_sections import LossConfig
from trainer.core import metrics
from trainer.core.metrics import Meter, Stopwatch, Totals
from trainer.core.separate_sums import SeparateSums
from trainer.data.batches import MicroBatch
from trainer.process.ranks import Ranks
from trainer.storage.checkpoint import Progress

IGNORED = -1
VALUES = st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=40)


@given(VALUES, st.data())
def test_totals_are_exact_in_any_order_and_grouping(
    values: list[float], data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(values))
    cut = data.draw(st.integers(0, len(values)))
    whole, parts = Totals(), [Totals(), Totals()]
    for value in values:
        whole.count("loss", value, 3.0)
    for number, value in enumerate(shuffled):
        parts[number < cut].count("loss", value, 3.0)
    joined = Totals(json.loads(json.dumps(parts[0].sums)))  # as through a checkpoint
    joined.add(parts[1])
    exact = sum(map(Fraction, values))
    for totals in (whole, joined):
        assert sum(map(Fraction, totals.sums["loss"][0])) == exact
        assert totals.means() == {"loss": float(exact) / (3.0 * len(values))}


def test_means_of_nothing_and_of_what_is_not_finite() -> None:
    totals = Totals()
    totals.count("a", 0.0, 0.0)
    for value in (1.0, math.nan, 2.0):
        totals.count("b", value, 1.0)
    for value in (1.0, math.inf, 2.0):
        totals.count("c", value, 1.0)
    means = totals.means()
    assert "a" not in means
    assert math.isnan(means["b"])  # a NaN is not hidden by what follows it
    assert not math.isfinite(means["c"])


def measure(
    waiting_elements: int, exact: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """Four ragged micro-batches with ignored targets: the meter's means and those by hand."""
    assert metrics.MAX_WAITING_ELEMENTS
    metrics.MAX_WAITING_ELEMENTS = waiting_elements
    task = build_task(LossConfig(args={"ignore_index": IGNORED}), 3)
    meter = Meter(task, Ranks("fp32"), exact=exact)
    draw = torch.Generator().manual_seed(0)
    outputs = [
        torch.randn(n, 3, generator=draw, dtype=torch.float64) for n in (5, 4, 7, 1)
    ]
    targets = [torch.randint(-1, 3, (len(o),), generator=draw) for o in outputs]
    for output, target in zip(outputs, targets, strict=True):
        meter.add(MicroBatch(0, None, target), output, task.loss_sum(output, target))
    means = meter.read().means()
    assert meter.read().means() == {}  # nothing since
    output, target = torch.cat(outputs), torch.cat(targets)
    counted = target != IGNORED
    hits = (output.argmax(1) == target)[counted].double().mean()
    loss = torch.nn.functional.cross_entropy(output, target, ignore_index=IGNORED)
    return means, {"loss": float(loss), "accuracy": float(hits)}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("waiting_elements", [1, 13, 1 << 22])
def test_means_are_over_counted_targets_however_many_outputs_wait(
    waiting_elements: int, exact: bool
) -> None:
    ((means, expected),) = on_ranks(1, measure, waiting_elements, exact)
    assert means == pytest.approx(expected, rel=1e-13)


def test_the_stopwatch_goes_on_from_earlier_sessions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now)
    progress = Progress(samples_seen=50, seconds=30.0)
    watch = Stopwatch(progress)
    now += 5
    # Since the resume, not the start.
    assert watch.pace(150, 2.0) == {"samples_per_second": 20, "data_wait": 0.4}
    now += 10
    # Since the last row.
    assert watch.pace(250, 0.0) == {"samples_per_second": 10, "data_wait": 0}
    watch.stop(progress)
    assert progress.seconds == 45


@pytest.mark.parametrize(
    ("arguments", "of_flush", "a_micro_batch"),
    [({}, 12, 0), ({"ignore_index": IGNORED}, 16, 1)],
)
def test_a_flush_takes_few_operations(
    arguments: dict[str, Any], of_flush: int, a_micro_batch: int
) -> None:
    """A row is part of its interval's steps: each operation of its meter takes time of theirs."""
    task = build_task(LossConfig(args=arguments), 3)
    output, target = torch.randn(4, 3), torch.arange(4) % 3
    meter = Meter(task, Ranks("fp32"))
    for _ in range(50):
        loss = task.loss_sum(output, target)
        meter.add(MicroBatch(0, None, target), output, loss)
    with Operations() as operations:
        meter.flush()
    assert operations.counts.total() <= of_flush + 50 * a_micro_batch


def test_outputs_of_several_shapes_are_measured_one_by_one() -> None:
    """Maps of pixels as large as their images, and one image without any pixel that counts."""
    task = build_task(LossConfig(args={"ignore_index": IGNORED}), 3)
    meter = Meter(task, Ranks("fp32"))
    hits = counted = 0
    for size in ((4, 4), (2, 5), (2, 5), (1, 1)):
        output = torch.randn(2, 3, *size, dtype=torch.float64)
        target = torch.randint(-1, 3, (2, *size))
        if size == (1, 1):
            target.fill_(IGNORED)
        meter.add(MicroBatch(0, None, target), output, task.loss_sum(output, target))
        is_counted = target != IGNORED
        hits += int(((output.argmax(1) == target) & is_counted).sum())
        counted += int(is_counted.sum())
    totals = meter.read()
    assert totals.sums["accuracy"] == ([hits], [counted])


def test_a_marked_place_is_gone_back_to() -> None:
    """Also where something was read, and so forgotten, before."""
    task = build_task(LossConfig(), 3)
    meter = Meter(task, Ranks("fp32"))
    output, target = torch.randn(4, 3), torch.arange(4) % 3

    def add() -> None:
        loss = task.loss_sum(output, target)
        meter.add(MicroBatch(0, None, target), output, loss)

    add()
    of_one = meter.read().sums
    add()
    forget = meter.mark()
    add()
    meter.flush()
    add()
    forget()
    assert meter.read().sums == of_one
    assert meter.read().means() == {}


def test_sums_kept_apart_take_no_operations_a_micro_batch_but_the_metrics_own() -> None:
    task = build_task(LossConfig(), 3)
    output, target = torch.randn(4, 3), torch.arange(4) % 3
    with Operations() as own:
        task.metric_sums(output, target)

    def operations(micro_batches: int) -> int:
        meter = Meter(task, Ranks("fp32"), exact=True)
        for _ in range(micro_batches):
            loss = task.loss_sum(output, target)
            meter.add(MicroBatch(0, None, target), output, loss)
        with Operations() as all_of_them:
            meter.flush()
        return all_of_them.counts.total()

    assert operations(9) - operations(1) == 8 * own.counts.total()


def test_sums_kept_apart_are_rounded_by_nothing() -> None:
    large = 2**24 + 1  # fp32 has no such number
    sums = SeparateSums(torch.float64, torch.device("cpu"))
    sums.add([[torch.tensor(0.1), torch.tensor(large)], [torch.tensor(-0.0), 7]])
    before = sums.copy()
    sums.add([[torch.tensor(large), 3]])
    tenth = float(torch.tensor(0.1))
    rows = [[tenth, large], [0.0, 7]]
    assert before.read() == rows
    assert sums.read() == [*rows, [large, 3]]
    assert math.copysign(1, sums.read()[1][0]) == 1
