"""Targets of everyday kinds reach the loss right, or are refused by one message with shapes and dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.test_task import draw, labels, task
from trainer.components.task import as_task
from trainer.errors import LockstepError

IDS = labels(6)
MASKS = labels(6, 4, 4)
ON_OFF = draw(6, 3) > 0
KINDS_OF_IDS: list[tuple[str, Any, Any]] = [
    ("int32", draw(6, 5), IDS.int()),
    ("int16", draw(6, 5), IDS.short()),
    ("uint8", draw(6, 5), IDS.byte()),
    ("float", draw(6, 5), IDS.float()),
    ("float64", draw(6, 5), IDS.double()),
    ("(N, 1)", draw(6, 5), IDS.unsqueeze(1)),
    ("(N, 1) float", draw(6, 5), IDS.unsqueeze(1).float()),
    ("a list of one", draw(6, 5), [IDS]),
    ("one-hot", draw(6, 5), nn.functional.one_hot(IDS, 5)),
    ("one-hot bool", draw(6, 5), nn.functional.one_hot(IDS, 5).bool()),
    ("one-hot list", draw(6, 5), list(nn.functional.one_hot(IDS, 5).unbind(1))),
    ("one-hot fp64", draw(6, 5).float(), nn.functional.one_hot(IDS, 5).double()),
    ("uint8 mask", draw(6, 5, 4, 4), MASKS.byte()),
    ("mask with a channel", draw(6, 5, 4, 4), MASKS.unsqueeze(1)),
    ("float mask with a channel", draw(6, 5, 4, 4), MASKS.unsqueeze(1).float()),
]


@pytest.mark.parametrize(
    ("kind", "output", "targets"), KINDS_OF_IDS, ids=[row[0] for row in KINDS_OF_IDS]
)
def test_class_ids_of_any_kind(kind: str, output: Tensor, targets: Any) -> None:
    plain = IDS if output.dim() == 2 else MASKS
    ours = task("cross_entropy", top_k=[2]).to(output.dtype)
    total, weight = ours.loss_sum(output, targets)
    assert float(total) / weight == pytest.approx(
        float(nn.functional.cross_entropy(output, plain)), rel=1e-6
    )
    expected = task("cross_entropy", top_k=[2]).metric_sums(output, plain)
    assert ours.metric_sums(output, targets) == expected
    if "one-hot" not in kind:
        assert torch.equal(ours.convert_targets(output, targets), plain)
        margin = nn.MultiMarginLoss()
        if output.dim() == 2:
            total, weight = as_task(margin).loss_sum(output, targets)
            expected_margin = float(margin(output, plain))
            assert float(total) / weight == pytest.approx(expected_margin, rel=1e-6)


@pytest.mark.parametrize(
    "targets",
    [ON_OFF, ON_OFF.byte(), ON_OFF.int(), ON_OFF.float(), list(ON_OFF.unbind(1))],
    ids=["bool", "uint8", "int32", "float32", "list"],
)
def test_labels_and_masks_of_a_binary_loss(targets: Any) -> None:
    output = draw(6, 3)
    expected = nn.functional.binary_cross_entropy_with_logits(output, ON_OFF.double())
    total, weight = task("bce_with_logits").loss_sum(output, targets)
    assert float(total) / weight == pytest.approx(float(expected), rel=1e-12)
    as_images = output.view(6, 1, 3, 1)
    total, weight = task("bce_with_logits").loss_sum(as_images, ON_OFF.view(6, 3, 1))
    assert float(total) / weight == pytest.approx(float(expected), rel=1e-12)


REFUSALS: list[tuple[Any, Any, Any, str]] = [
    ("cross_entropy", draw(6, 5), IDS + 0.5, r"a target is \S+\.5, and class ids are whole"),
    ("cross_entropy", draw(6, 5), labels(6, 2), r"float64 with .* targets \(6, 2\) int64"),
    ("cross_entropy", draw(6, 5), ["cat"] * 6, "targets list of str: one tensor is needed"),
    ("cross_entropy", draw(6, 5), {"ids": IDS}, r"dict of \(6,\) int64: one tensor is needed"),
    ("cross_entropy", draw(6), IDS, r"the model's \(6,\) float64 with"),
    ("mse", draw(6, 2, 3), draw(6, 3, 2), r"\(6, 2, 3\) float64 .* \(6, 3, 2\) float64"),
    ("mse", draw(6, 4), draw(4, 6), r"\(6, 4\) float64 .* \(4, 6\) float64"),
    ("bce_with_logits", draw(6, 3), ON_OFF.byte() * 255, "a target is 255, and those of this loss are from 0 to 1"),
    ("torch.nn.SoftMarginLoss", draw(6, 3), ON_OFF, "a target is 0, and those of this loss are -1 or 1"),
    ("torch.nn.HingeEmbeddingLoss", draw(6, 3), ON_OFF, "a target is 0, and"),
    ("torch.nn.MultiLabelMarginLoss", draw(6, 3), ON_OFF.float(), r"targets \(6, 3\) float32"),
    ("torch.nn.NLLLoss", draw(6, 5), draw(6, 5).softmax(1), r"targets \(6, 5\) float64"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "output", "targets", "message"), REFUSALS)
def test_what_has_no_plain_meaning_is_refused(
    name: str, output: Tensor, targets: Any, message: str
) -> None:
    with pytest.raises(LockstepError, match=message):
        task(name).loss_sum(output, targets)


def test_flat_and_shaped_values_are_the_same() -> None:
    """Six numbers for each sample, as a head gives them, against three points of two coordinates."""
    output, targets = draw(6, 6), draw(6, 3, 2)
    total, weight = task("mse").loss_sum(output, targets)
    expected = nn.functional.mse_loss(output.view(6, 3, 2), targets)
    assert float(total) / weight == pytest.approx(float(expected), rel=1e-12)
