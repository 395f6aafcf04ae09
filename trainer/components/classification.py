"""Classification of samples and pixels: by scores, as cross-entropy, or by log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.components.answers import Answer
from trainer.components.base_task import ScoresTask, WeightedSum
from trainer.components.targets import (
    as_class_targets,
    check_output,
    is_plain_ids,
    largest_class,
)
from trainer.errors import ConfigError, DataError

# An ignore_index that no target has; torch's default of -100 would hide wrong labels.
NO_LABEL = -(2**31)


class CrossEntropy(ScoresTask):
    """Classification of samples `(N, C)` or pixels `(N, C, H, W)`; targets are class ids, or probabilities.

    Args:
        class_weights: one weight per class; the loss is then the weighted mean, as in `torch.nn.CrossEntropyLoss`.
        ignore_index: targets with this value are not counted. None: every target is.
        label_smoothing: share of the target spread over all classes (Szegedy et al., 2016), in [0, 1).
        top_k: further accuracies to measure, by k.
    """

    metrics_add_up = True
    targets_are_classes = True
    _takes_probabilities = True

    def __init__(
        self,
        class_weights: Sequence[float] | Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        top_k: Sequence[int] = (),
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        self._checks_values = True  # those of the first targets only
        if not 0 <= label_smoothing < 1:
            raise ConfigError(
                "loss.label_smoothing", f"{label_smoothing} is not in [0, 1)"
            )
        check_class_weights("loss.class_weights", class_weights, num_classes)
        self.register_buffer(
            "class_weights", as_weights(class_weights), persistent=False
        )
        self.class_weights: Tensor | None
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.top_k = tuple(top_k)
        self.metrics = ("accuracy", *(f"top{k}_accuracy" for k in self.top_k))

    def convert_targets(self, output: Tensor, targets: Any) -> Tensor:
        if is_plain_ids(targets, output):
            return targets
        check_output(output, "cross_entropy")
        converted = as_class_targets(
            output,
            targets,
            probabilities=self._takes_probabilities,
            check_values=self._checks_values,
        )
        if self._checks_values:
            self._checks_values = False
        return converted

    def loss_sum(self, output: Tensor, targets: Tensor) -> WeightedSum:
        targets = self.convert_targets(output, targets)
        scores, labels = output, targets
        if output.dim() > 2:
            scores, labels = _pixels_as_samples(output, targets)
        ignored = NO_LABEL if self.ignore_index is None else self.ignore_index
        # Looked up once, where a module keeps it: `self.class_weights` takes ten times as long.
        class_weights = self._buffers["class_weights"]
        try:
            total = self._total(scores, labels, ignored, class_weights)
        except IndexError as error:
            # On the CPU only: a GPU reports a wrong label as a failed assertion.
            raise DataError(
                f"{str(error).rstrip('.').lower()}: the model gives {output.shape[1]} classes, 0 to "
                f"{output.shape[1] - 1}; correct the data, or set model.num_classes or loss.ignore_index"
            ) from None
        return WeightedSum(total, self._weight(targets, class_weights))

    def _total(
        self,
        output: Tensor,
        targets: Tensor,
        ignore_index: int,
        class_weights: Tensor | None,
    ) -> Tensor:
        return F.cross_entropy(
            output,
            targets,
            class_weights,
            ignore_index=ignore_index,
            label_smoothing=self.label_smoothing,
            reduction="sum",
        )

    def _weight(self, targets: Tensor, class_weights: Tensor | None) -> Tensor | int:
        """What torch's mean divides by: a count of targets, or the sum of their classes' weights."""
        # Probabilities: torch divides by the samples (pixels), weighted or not.
        if targets.is_floating_point():
            return targets.numel() // targets.shape[1]
        if self.ignore_index is None:
            if class_weights is None:
                return targets.numel()
            return class_weights[targets].sum()
        is_counted = targets != self.ignore_index
        if class_weights is None:
            return is_counted.sum()
        # Not `targets[is_counted]`: the length of a selection is known to the host only once the device is done.
        weights = class_weights[targets.where(is_counted, 0)]
        return weights.where(is_counted, 0).sum()

    def metric_sums(self, output: Tensor, targets: Tensor) -> dict[str, WeightedSum]:
        targets = self.convert_targets(output, targets)
        labels = largest_class(targets) if targets.is_floating_point() else targets
        hits = {"accuracy": largest_class(output) == labels}
        for k in self.top_k:
            best = output.topk(min(k, output.shape[1]), 1).indices
            hits[f"top{k}_accuracy"] = (best == labels.unsqueeze(1)).any(1)
        # torch ignores no shares of classes either.
        sums: dict[str, WeightedSum] = {}
        if self.ignore_index is None or targets.is_floating_point():
            for name, is_hit in hits.items():
                sums[name] = WeightedSum(is_hit.sum(), labels.numel())
            return sums
        is_counted = labels != self.ignore_index
        count = is_counted.sum()
        for name, is_hit in hits.items():
            # The ignored value may be a class that the model predicts.
            counted_hits = is_hit & is_counted
            sums[name] = WeightedSum(counted_hits.sum(), count)
        return sums

    def probabilities(self, output: Tensor) -> Tensor | None:
        return self._normalized(output) if output.dim() == 2 else None

    def answer(self, output: Tensor) -> Answer | None:
        if output.dim() < 3:
            return super().answer(output)
        return Answer("class_map", self._normalized(output))

    def _normalized(self, output: Tensor) -> Tensor:
        return output.softmax(1)


class NegativeLogLikelihood(CrossEntropy):
    """Classification by log-probabilities, as `torch.nn.NLLLoss`: for models that end in a log-softmax."""

    _takes_probabilities = False

    def _total(
        self,
        output: Tensor,
        targets: Tensor,
        ignore_index: int,
        class_weights: Tensor | None,
    ) -> Tensor:
        return F.nll_loss(
            output,
            targets,
            class_weights,
            ignore_index=ignore_index,
            reduction="sum",
        )

    def _normalized(self, output: Tensor) -> Tensor:
        return output.exp()


def _pixels_as_samples(output: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Scores `(N, C, H, W)` and labels `(N, H, W)` as `(N·H·W, C)` and `(N·H·W,)`, for deterministic algorithms alone.

    CUDA has no deterministic kernel for a negative log-likelihood of images, and has one for that of samples.
    """
    if targets.is_floating_point() or not torch.are_deterministic_algorithms_enabled():
        return output, targets
    if output.shape[:1] + output.shape[2:] != targets.shape:
        return output, targets  # torch says what does not fit
    rows = output.movedim(1, -1).flatten(0, -2)
    return rows, targets.flatten()


def as_weights(weights: Sequence[float] | Tensor | None) -> Tensor | None:
    """In fp64, to be cast to the run's dtype with the task."""
    return (
        None
        if weights is None
        else torch.as_tensor(weights, dtype=torch.float64).clone()
    )


def check_class_weights(
    key: str, weights: Sequence[float] | Tensor | None, num_classes: int | None
) -> None:
    if weights is not None and num_classes is not None and len(weights) != num_classes:
        raise ConfigError(key, f"{len(weights)} weights for {num_classes} classes")
