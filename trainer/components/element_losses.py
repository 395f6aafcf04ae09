"""Losses whose sum is divided by a count of the output: of its elements, most often."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from trainer.components.answers import Answer, AnswerKind
from trainer.components.base_task import ScoresTask, WeightedSum
from trainer.components.classification import as_weights
from trainer.components.divisor import Divisor, count_elements, find_divisor
from trainer.components.targets import check_output, check_range
from trainer.components.torch_losses import (
    REGRESSION,
    LossRule,
    check_weight_shape,
    rule_of,
)
from trainer.process.device import sum_dtype


class ElementLoss(ScoresTask):
    """A loss `loss(output, targets)` that gives a 0-dim sum, divided and measured as its `rule` says.

    If the rule does not know what the sum is divided by, it is found on the first samples, by comparing it with
    `mean`, the same loss with that reduction.
    """

    metrics_add_up = True

    def __init__(
        self,
        loss: Callable[[Tensor, Tensor], Tensor],
        rule: LossRule,
        mean: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self._loss = loss
        self._rule = rule
        self._mean = mean
        self._divisor: Divisor | None = rule.divisor
        self._is_checked = False
        self.metrics = () if rule.metric is None else (rule.metric,)
        # Only what is right or wrong has an accuracy.
        self.targets_are_classes = rule.metric == "accuracy"

    @property
    def answer_kind(self) -> AnswerKind | None:
        """What a model that was trained with this loss answers; None where that is not known."""
        return self._rule.answer_kind

    def convert_targets(self, output: Tensor, targets: Any) -> Tensor:
        check_output(output, "this loss")
        return self._rule.convert(output, targets)

    def loss_sum(self, output: Tensor, targets: Tensor) -> WeightedSum:
        targets = self.convert_targets(output, targets)
        if not self._is_checked:
            self._check(output, targets)
        # A loss of 0 on all samples so far says nothing of its divisor.
        divisor = self._divisor or count_elements
        return WeightedSum(self._loss(output, targets), divisor(output))

    def _check(self, output: Tensor, targets: Tensor) -> None:
        """Check what the first samples show. Waits for the device."""
        check_weight_shape(self._loss, output)
        check_range(targets, self._rule.allowed)
        if self._divisor is None and self._mean is not None:
            loss: Any = self._loss
            self._divisor = find_divisor(self._mean, loss, output, targets)
        self._is_checked = self._divisor is not None

    def metric_sums(self, output: Tensor, targets: Tensor) -> dict[str, WeightedSum]:
        rule = self._rule
        if rule.metric is None or rule.terms is None:
            return {}
        # A metric adds up over a whole epoch.
        terms = rule.terms(self._loss, output, self.convert_targets(output, targets))
        total = terms.sum(dtype=sum_dtype(terms.device))
        return {rule.metric: WeightedSum(total, terms.numel())}

    def answer(self, output: Tensor) -> Answer | None:
        rule = self._rule
        if rule.answer is None or rule.answer_kind is None:
            return None
        return Answer(rule.answer_kind, rule.answer(self._loss, output))


class Regression(ElementLoss):
    """A loss between outputs and targets of one shape, given by `loss(output, target)`, a 0-dim sum."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(loss, REGRESSION)


class MSE(Regression):
    """Mean squared error over all elements; the metric is the mean absolute error."""

    def __init__(self) -> None:
        super().__init__(nn.MSELoss(reduction="sum"))


class BCEWithLogits(ElementLoss):
    """Binary cross-entropy of logits over all elements: one, or one per label, for each sample.

    Args:
        pos_weight: weight of the positive examples, one per label, as in `torch.nn.BCEWithLogitsLoss`.
    """

    def __init__(self, pos_weight: Sequence[float] | None = None) -> None:
        loss = nn.BCEWithLogitsLoss(pos_weight=as_weights(pos_weight), reduction="sum")
        super().__init__(loss, rule_of(loss))
