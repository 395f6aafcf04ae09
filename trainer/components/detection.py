"""Detection as by torchvision's detectors: losses of their own in training, boxes in evaluation (docs/detection.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.components.answers import Answer
from trainer.components.base_task import Task, WeightedSum
from trainer.errors import ConfigError, DataError
from trainer.exact.structures import describe_tensors

MODEL = "as torchvision's do: model(images, targets) → a dict of losses in training, model(images) → a list of dicts"
BOX_EDGES = 4  # x1, y1, x2, y2

Target = dict[str, Tensor]


class Detection(Task):
    """The sum of the losses that the model returns, and how many boxes it finds.

    A sample is an image `(C, H, W)`, of any size, and a dict with `boxes` `(K, 4)` as (x1, y1, x2, y2) in pixels and
    `labels` `(K,)`, in which 0 is the background. Other entries, such as `masks`, go to the model as they are.

    The model averages its losses over a micro-batch, by rules of its own; a step's loss is the mean of that over its
    images. An evaluation has no loss, as the model gives none in eval mode. It measures `precision`, the share of the
    boxes with a score of at least `score` that meet a true box of their class, and `recall`, the share of the true
    boxes that are met. Two boxes meet if their intersection is at least `iou` of their union, each at most once, those
    with the highest score first.
    """

    metrics = ("recall", "precision")
    metrics_add_up = True
    collate = "lists"
    validates_loss = False

    def __init__(self, score: float = 0.5, iou: float = 0.5) -> None:
        super().__init__()
        for name, value in (("score", score), ("iou", iou)):
            if not 0 <= value <= 1:
                raise ConfigError(f"loss.{name}", f"{value} is not in [0, 1]")
        self.score = score
        self.iou = iou

    def predict(self, model: nn.Module, inputs: Any) -> Any:
        """In eval mode a dict of `boxes`, `labels` and `scores` for each image."""
        return model(list(inputs))

    def predict_with_targets(self, model: nn.Module, inputs: Any, targets: Any) -> Any:
        """The losses in training; in evaluation what `predict` gives."""
        if not model.training:
            return self.predict(model, inputs)
        return model(list(inputs), self.convert_targets(inputs, targets))

    def convert_targets(self, output: Any, targets: Any) -> list[Target]:
        """The targets as the model takes them: plain tensors, boxes of the images' type (`output`), int64 labels."""
        if not isinstance(targets, Sequence) or isinstance(targets, str):
            raise DataError(
                f"detection needs a target for each image, and the batch has {describe_tensors(targets)}; set "
                f"data.collate=lists"
            )
        dtype = _float_type(output)
        return [_convert(target, dtype) for target in targets]

    def loss_sum(self, output: Any, targets: Any) -> WeightedSum:
        if not isinstance(output, Mapping):  # boxes
            return WeightedSum(torch.zeros((), device=_device_of(output)), 0)
        losses = list(output.values())
        if not losses or not all(isinstance(loss, Tensor) for loss in losses):
            raise ConfigError(
                "model.name",
                f"the model gives {describe_tensors(output)} in training; detection needs one that works {MODEL}",
            )
        # The mean over a micro-batch, as often as that has images: the step's mean is then that over all of its images.
        return WeightedSum(torch.stack(losses).sum() * len(targets), len(targets))

    def metric_sums(self, output: Any, targets: Any) -> dict[str, WeightedSum]:
        device = _device_of(output)
        nothing = WeightedSum(torch.zeros((), device=device), 0)
        if isinstance(output, Mapping):  # losses
            return {"recall": nothing, "precision": nothing}
        met, true, found = 0, 0, 0
        converted = self.convert_targets(output, targets)
        for answer, target in zip(output, converted, strict=True):
            is_sure = answer["scores"] >= self.score
            sure = {name: answer[name][is_sure] for name in ("boxes", "labels")}
            met += self._count_met(sure, target)
            true += len(target["boxes"])
            found += len(sure["boxes"])
        count = torch.tensor(met, device=device)
        return {
            "recall": WeightedSum(count, true),
            "precision": WeightedSum(count, found),
        }

    def _count_met(self, answer: Mapping[str, Tensor], target: Target) -> int:
        """How many of the `answer`'s boxes, the surest first, meet a true box that none before has met."""
        from torchvision.ops import box_iou

        # On the host: there are few boxes, and each depends on those before it.
        boxes = answer["boxes"]
        overlaps = box_iou(boxes, target["boxes"].to(boxes)).cpu()
        labels = answer["labels"].cpu()
        is_same_class = labels[:, None] == target["labels"].cpu()
        # Below any overlap: neither a box of another class nor one that is taken can be met.
        overlaps = overlaps.where(is_same_class, -1.0)
        met = 0
        for row in overlaps:
            if not row.numel():
                break
            overlap, index = row.max(0)
            if overlap >= self.iou:
                met += 1
                overlaps[:, index] = -1.0
        return met

    def metric_inputs(self, output: Any, targets: Any) -> tuple[Any, Any] | None:
        """Answers and targets as `torchmetrics.detection` takes them; None for losses."""
        if isinstance(output, Mapping):
            return None
        return output, self.convert_targets(output, targets)

    def answer(self, output: Any) -> Answer | None:
        rows = []
        for answer in output:
            boxes = answer["boxes"]
            scores = answer["scores"][:, None]
            labels = answer["labels"][:, None].to(boxes)
            rows.append(torch.cat([boxes, scores, labels], 1))
        return Answer("boxes", rows)


def _convert(target: Any, dtype: torch.dtype) -> Target:
    if not isinstance(target, Mapping) or not {"boxes", "labels"} <= target.keys():
        raise DataError(
            f"detection needs targets that are a dict of boxes and labels, and one is {describe_tensors(target)}"
        )
    converted = {}
    for name, value in target.items():
        is_tensor = isinstance(value, Tensor)
        # A plain one: torchvision's `tv_tensors` keep their type in some operations and lose it in others.
        converted[name] = value.as_subclass(Tensor) if is_tensor else value
    boxes = torch.as_tensor(converted["boxes"])
    labels = torch.as_tensor(converted["labels"])
    if not boxes.numel():  # of an empty list, with one dimension
        boxes = boxes.reshape(0, BOX_EDGES)
    if boxes.dim() != 2 or boxes.shape[1] != BOX_EDGES or len(labels) != len(boxes):
        raise DataError(
            f"a target has boxes {tuple(boxes.shape)} and labels {tuple(labels.shape)}; detection needs (K, 4) and (K,)"
        )
    return converted | {"boxes": boxes.to(dtype), "labels": labels.long()}


def _float_type(values: Any) -> torch.dtype:
    """The type of the first floating tensor, which is that of the images, or of the boxes that a model gives."""
    for value in values:
        tensors = value.values() if isinstance(value, Mapping) else [value]
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                return tensor.dtype
    return torch.float32


def _device_of(output: Any) -> torch.device | None:
    tensors = output if isinstance(output, Mapping) else output[0]
    tensor: Tensor = next(iter(tensors.values()))
    return tensor.device
