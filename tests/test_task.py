"""Losses and metrics against torch's own means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.components.task import Task, build_task
from trainer.config.schema import LossConfig
from trainer.errors import ConfigError, DataError


def task(name: str, num_classes: int | None = None, **args: Any) -> Task:
    return build_task(LossConfig(name=name, args=args), num_classes).double()


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def labels(*shape: int, ignored: bool = False) -> Tensor:
    drawn_labels = torch.randint(5, shape, generator=torch.Generator().manual_seed(7))
    return (
        torch.where(torch.rand(shape, generator=torch.Generator().manual_seed(8)) < 0.3, -7, drawn_labels)
        if ignored
        else drawn_labels
    )


WEIGHTS = [0.1, 2.0, 1.0, 0.0, 5.0]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("shape", [(11,), (3, 4, 6)])
def test_cross_entropy_is_torchs_mean(smoothing: float, weights: Any, ignored: bool, shape: tuple[int, ...]) -> None:
    output, targets = drawn(shape[0], 5, *shape[1:]), labels(*shape, ignored=ignored)
    options: dict[str, Any] = {"ignore_index": -7} if ignored else {}
    ours = task("cross_entropy", 5, label_smoothing=smoothing, class_weights=weights, **options)
    total, weight = ours.loss_sum(output, targets)
    torch_weights = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    theirs = nn.CrossEntropyLoss(torch_weights, label_smoothing=smoothing, **options)(output, targets)
    assert float(total / weight) == pytest.approx(float(theirs), rel=1e-12)
    counted = targets != -7
    accuracy, count = ours.metric_sums(output, targets)["accuracy"]
    assert int(accuracy) == int((output.argmax(1) == targets)[counted].sum())
    assert int(count) == int(counted.sum())


def test_soft_targets() -> None:
    output, targets = drawn(9, 5), drawn(9, 5).softmax(1)
    total, weight = task("cross_entropy").loss_sum(output, targets)
    assert float(total / weight) == pytest.approx(float(nn.functional.cross_entropy(output, targets)), rel=1e-12)
    accuracy, _ = task("cross_entropy").metric_sums(output, targets)["accuracy"]
    assert int(accuracy) == int((output.argmax(1) == targets.argmax(1)).sum())


def test_no_label_is_ignored_unless_asked() -> None:
    """torch would leave out -100 by default, and divide by too many."""
    with pytest.raises(DataError, match="target -100 is out of bounds"):
        task("cross_entropy").loss_sum(drawn(2, 5), torch.tensor([1, -100]))


def test_top_k() -> None:
    output, targets = drawn(50, 5), labels(50)
    sums = task("cross_entropy", top_k=[2, 9]).metric_sums(output, targets)
    assert list(sums) == list(task("cross_entropy", top_k=[2, 9]).metrics)
    by_hand = sum(
        int(label) in row.argsort(descending=True)[:2].tolist() for row, label in zip(output, targets, strict=True)
    )
    assert int(sums["top2_accuracy"][0]) == by_hand
    assert int(sums["top9_accuracy"][0]) == 50


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("mse", nn.MSELoss()),
        ("bce_with_logits", nn.BCEWithLogitsLoss()),
        ("torch.nn.SmoothL1Loss", nn.SmoothL1Loss()),
    ],
)
@pytest.mark.parametrize("shape", [(8, 1), (8, 3), (4, 2, 3, 3)])
def test_losses_between_equal_shapes(name: str, theirs: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    output, targets = drawn(*shape), drawn(*shape).sigmoid()
    ours = task(name)
    total, weight = ours.loss_sum(output, targets)
    assert float(total / weight) == pytest.approx(float(theirs(output, targets)), rel=1e-12)
    if "mae" in ours.metrics:
        error, count = ours.metric_sums(output, targets)["mae"]
        assert float(error / count) == pytest.approx(float((output - targets).abs().mean()), rel=1e-12)


def test_a_column_against_a_row_is_no_table() -> None:
    """(8, 1) against (8,) would broadcast to (8, 8) and train nonsense."""
    output, targets = drawn(8, 1), drawn(8)
    total, weight = task("mse").loss_sum(output, targets)
    assert weight == 8
    assert float(total) == pytest.approx(float(((output[:, 0] - targets) ** 2).sum()), rel=1e-12)
    with pytest.raises(ConfigError, match=r"loss\.name: the model gives \(8, 3\) for targets of shape \(8,\)"):
        task("mse").loss_sum(drawn(8, 3), targets)


def test_what_cross_entropy_cannot_use_is_said() -> None:
    with pytest.raises(DataError, match=r"target 3 is out of bounds: the model gives 3 classes, 0 to 2"):
        task("cross_entropy").loss_sum(drawn(2, 3), torch.tensor([0, 3]))
    with pytest.raises(ConfigError, match=r"loss\.name: cross_entropy needs one tensor of scores, .* gives a dict"):
        task("cross_entropy").loss_sum({"out": drawn(2, 3)}, torch.tensor([0, 2]))


def test_positive_weights() -> None:
    output, targets = drawn(6, 3), (drawn(6, 3) > 0).double()
    total, weight = task("bce_with_logits", pos_weight=[1.0, 2.0, 3.0]).loss_sum(output, targets)
    theirs = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 3.0]).double())(output, targets)
    assert float(total / weight) == pytest.approx(float(theirs), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("cross_entropi", {}, 'did you mean "cross_entropy"'),
        ("cross_entropy", {"label_smoothing": 1.5}, "loss.label_smoothing: 1.5 is not in"),
        ("cross_entropy", {"class_weights": [1.0]}, "loss.class_weights: 1 weights for 5 classes"),
        ("cross_entropy", {"ignore": 3}, 'did you mean "ignore_index"'),
        ("math.sqrt", {}, "loss"),
    ],
)
def test_mistakes(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        task(name, 5, **args)
    assert message in str(caught.value)
