"""Every loss of torch.nn against torch's own mean, and losses of one's own: what a sum is divided by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.test_task import (
    CLASS_WEIGHTS,
    SMALL_WEIGHTS,
    TORCH_LOSSES,
    draw,
    labels,
    task,
)
from trainer import WeightedSum
from trainer.components.task import as_task, as_weighted_sum, build_task
from trainer.components.torch_losses import REFUSED, RULES
from trainer.config.model_sections import LossConfig
from trainer.errors import ConfigError

PIXEL_WEIGHTS = SMALL_WEIGHTS.view(3, 1, 1)
ABOVE_ZERO = (draw(7, 3, 4, 2) > 0).double()
# A loss, an output and its targets: shapes and weights that `TORCH_LOSSES` does not have.
MORE_LOSSES: list[tuple[nn.Module, Tensor, Tensor]] = [
    (
        nn.CrossEntropyLoss(CLASS_WEIGHTS, ignore_index=-7, label_smoothing=0.1),
        draw(7, 5, 4, 2),
        labels(7, 4, 2, ignored=True),
    ),
    (
        nn.CrossEntropyLoss(CLASS_WEIGHTS, ignore_index=2),
        draw(7, 5, 4),
        labels(7, 4),
    ),
    (
        nn.CrossEntropyLoss(CLASS_WEIGHTS, label_smoothing=0.1),
        draw(7, 5, 4),
        draw(7, 5, 4).softmax(1),
    ),
    (
        nn.NLLLoss(CLASS_WEIGHTS, ignore_index=1),
        draw(7, 5, 4, 2).log_softmax(1),
        labels(7, 4, 2),
    ),
    (
        nn.BCEWithLogitsLoss(PIXEL_WEIGHTS, pos_weight=PIXEL_WEIGHTS),
        draw(7, 3, 4, 2),
        ABOVE_ZERO,
    ),
    (nn.BCELoss(PIXEL_WEIGHTS), draw(7, 3, 4, 2).sigmoid(), ABOVE_ZERO),
    (nn.KLDivLoss("batchmean"), draw(7, 4, 3).log_softmax(2), draw(7, 4, 3).softmax(2)),
    (
        nn.MultiLabelSoftMarginLoss(SMALL_WEIGHTS),
        draw(7, 4, 3),
        (draw(7, 4, 3) > 0).double(),
    ),
    (nn.MSELoss(), draw(7, 3, 4, 2), draw(7, 3, 4, 2).sin()),
    (nn.L1Loss(), draw(7), draw(7).sin()),
]
ALL_LOSSES = [case[:3] for case in TORCH_LOSSES] + MORE_LOSSES


def summed_over_parts(ours: Any, output: Tensor, targets: Tensor) -> Tensor:
    """The mean that a step makes of three micro-batches of unequal size."""
    totals, weights = [], []
    for part in ([0, 1, 2], [3], list(range(4, len(output)))):
        total, weight = ours.loss_sum(output[part], targets[part])
        totals.append(total)
        weights.append(torch.as_tensor(weight))
    return torch.stack(totals).sum() / torch.stack(weights).sum()


@pytest.mark.filterwarnings(
    "ignore:reduction. 'mean' divides the total loss:UserWarning"
)
@pytest.mark.parametrize(
    ("loss", "output", "targets"), ALL_LOSSES, ids=[str(case[0]) for case in ALL_LOSSES]
)
def test_loss_and_gradient_over_unequal_micro_batches_are_those_of_torchs_mean(
    loss: Any, output: Tensor, targets: Tensor
) -> None:
    ours = as_task(loss).double()
    expected_output = output.clone().requires_grad_()
    expected = loss(expected_output, targets)
    expected.backward()
    actual_output = output.clone().requires_grad_()
    actual = summed_over_parts(ours, actual_output, targets)
    actual.backward()  # type: ignore[no-untyped-call]
    assert expected_output.grad is not None
    assert actual.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(
        actual_output.grad, expected_output.grad, rtol=1e-12, atol=1e-15
    )


def test_no_loss_of_torch_is_forgotten() -> None:
    """Also one that a later torch adds: it is summed by a rule, computed by a task, or refused by name."""
    losses = {
        value
        for name, value in vars(nn).items()
        if "Loss" in name and isinstance(value, type) and issubclass(value, nn.Module)
    }
    assert len(losses) > 20
    by_task = {nn.CrossEntropyLoss, nn.NLLLoss}
    unknown = {
        loss.__name__
        for loss in losses - RULES.keys() - by_task
        if not any(base.__name__ in REFUSED for base in loss.__mro__)
        and not issubclass(loss, nn.NLLLoss)
    }
    assert not unknown
    tested = {type(case[0]) for case in ALL_LOSSES}
    assert tested >= RULES.keys() | by_task


# ---------------------------------------------------------------- accuracy and ignored targets


@pytest.mark.parametrize("shape", [(40,), (8, 3, 4)])
def test_an_ignored_target_is_no_hit(shape: tuple[int, ...]) -> None:
    """The ignored value is a class here, which the model may well predict."""
    output, targets = draw(shape[0], 5, *shape[1:]), labels(*shape)
    output.scatter_add_(1, targets.unsqueeze(1), torch.full_like(output, 3.0))
    counted = targets != 2
    ours = task("cross_entropy", ignore_index=2, top_k=[2])
    sums = ours.metric_sums(output, targets)
    hits = (output.argmax(1) == targets)[counted]
    assert sums["accuracy"] == (hits.sum(), counted.sum())
    best = output.topk(2, 1).indices
    hits = (best == targets.unsqueeze(1)).any(1)[counted]
    assert sums["top2_accuracy"] == (hits.sum(), counted.sum())


def test_without_a_counted_target_nothing_is_nan() -> None:
    output = draw(4, 5).requires_grad_()
    ours = task("cross_entropy", ignore_index=2, class_weights=[1.0, 2, 3, 4, 5])
    total, weight = ours.loss_sum(output, torch.full((4,), 2))
    total.backward()  # type: ignore[no-untyped-call]
    assert output.grad is not None
    assert (total.item(), float(weight), output.grad.abs().max().item()) == (0, 0, 0)


# ---------------------------------------------------------------- losses that are not torch's


class Focal(nn.CrossEntropyLoss):
    """A focal loss as people write it: computed by class, averaged over samples."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        losses = F.cross_entropy(input, target, reduction="none")
        losses = (1 - torch.exp(-losses)) ** 2 * losses
        return losses.mean() if self.reduction == "mean" else losses.sum()


class SampleMean(nn.Module):
    """Sums over the labels and averages over the samples: not over the elements."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        losses = (output - targets).square().flatten(1).sum(1)
        return losses.mean() if self.reduction == "mean" else losses.sum()


class PixelMean(SampleMean):
    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        losses = (output - targets).square().sum(1)
        return losses.mean() if self.reduction == "mean" else losses.sum()


class Dice(SampleMean):
    """A ratio over the whole micro-batch is no sum over samples."""

    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        shares = output.sigmoid()
        loss = 1 - 2 * (shares * targets).sum() / (shares + targets).sum()
        return loss if self.reduction == "mean" else loss * len(output)


class ByValue(SampleMean):
    """Divides by what the targets say."""

    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        losses = (output - targets).square() * targets
        return (
            losses.sum() / targets.sum() if self.reduction == "mean" else losses.sum()
        )


class Deaf(SampleMean):
    """Averages whatever its reduction is."""

    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        return (output - targets).square().mean()


@pytest.mark.parametrize(
    ("loss", "shape", "of_classes"),
    [
        (Focal(), (7, 5), True),
        (Focal(), (7, 5, 2, 3), True),
        (SampleMean(), (7, 5), False),
        (SampleMean("sum"), (7, 5, 2, 3), False),
        (PixelMean(), (7, 5, 2, 3), False),
    ],
)
def test_what_a_loss_of_ones_own_divides_by_is_measured(
    loss: Any, shape: tuple[int, ...], of_classes: bool
) -> None:
    output = draw(*shape)
    targets = labels(shape[0], *shape[2:]) if of_classes else draw(*shape).sin()
    mean = type(loss)()
    expected = float(mean(output, targets))
    by_name = build_task(LossConfig(name=f"{__name__}.{type(loss).__name__}"), None)
    for ours in (as_task(loss), by_name):
        actual = float(summed_over_parts(ours, output, targets))
        assert actual == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (Dice(), "Dice with reduction=sum .* is no sum over samples"),
        (Deaf(), "Deaf with reduction=sum .* is no sum over samples"),
        (
            ByValue(),
            r"the mean of ByValue divides by .* which is the number of neither",
        ),
    ],
)
def test_a_loss_without_a_known_divisor_is_refused(
    loss: nn.Module, message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^loss\.name: {message}.*trainer\.Task"):
        as_task(loss).loss_sum(draw(7, 3), ABOVE_ZERO[:, :, 0, 0])


def test_a_weight_for_each_place_in_a_batch_is_refused() -> None:
    for loss in (nn.BCEWithLogitsLoss(draw(7, 3).exp()), nn.BCELoss(draw(7, 1).exp())):
        with pytest.raises(
            ConfigError, match=r"^loss\.weight: of shape .* a row for each place"
        ):
            as_task(loss).double().loss_sum(draw(7, 3).sigmoid(), ABOVE_ZERO[..., 0, 0])


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(3), r"a tensor \(3,\) as the weight; sum it"),
        (torch.ones((), requires_grad=True), "a weight with a gradient"),
        (2.0, "a float as the weight; give an int or a 0-dim tensor"),
        (None, "a NoneType as the weight"),
    ],
)
def test_what_is_no_weight(weight: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        as_weighted_sum((torch.tensor(1.0), weight))


def test_numpys_integers_are_counts() -> None:
    import numpy as np

    pair = as_weighted_sum((torch.tensor(1.0), np.int64(3)))
    assert pair == WeightedSum(torch.tensor(1.0), 3)
    assert type(pair.weight) is int


class PlainFocal(nn.Module):
    """The same loss, which does not say that it takes class ids."""

    reduction = "mean"

    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output, targets, reduction=self.reduction)


def test_class_ids_for_a_loss_that_does_not_say_so() -> None:
    with pytest.raises(
        ConfigError, match=r"class ids .* extend torch\.nn\.CrossEntropyLoss"
    ):
        as_task(PlainFocal()).loss_sum(draw(7, 5), labels(7))
