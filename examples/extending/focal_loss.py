"""A task: a loss and a metric of one's own."""

from __future__ import annotations

from torch import Tensor

from trainer import Task, WeightedSum


class FocalLoss(Task):
    """Cross-entropy in which a sample counts less the better it is classified.

    Lin et al., 2017, "Focal loss for dense object detection". With `gamma` 0 it is cross-entropy.
    """

    metrics = ("accuracy",)
    # Each sample is right or wrong by itself, so several micro-batches may be measured at once.
    metrics_add_up = True

    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__()
        self.gamma = gamma

    def loss_sum(self, output: Tensor, targets: Tensor) -> WeightedSum:
        """The sum over the samples, and what the whole step's sum is divided by: their number."""
        log_probability = output.log_softmax(1).gather(1, targets.unsqueeze(1))
        losses = -((1 - log_probability.exp()) ** self.gamma) * log_probability
        return WeightedSum(losses.sum(), len(targets))

    def metric_sums(self, output: Tensor, targets: Tensor) -> dict[str, WeightedSum]:
        return {
            "accuracy": WeightedSum((output.argmax(1) == targets).sum(), len(targets))
        }

    def probabilities(self, output: Tensor) -> Tensor:
        """With it, a run draws its confusion matrix and `predict` works."""
        return output.softmax(1)
