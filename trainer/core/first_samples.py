"""The first sample of each part, read before the model is built: what could not be trained on is said at the start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.components.models import input_channels
from trainer.components.task import CrossEntropy, Task
from trainer.data.datasets import Datasets
from trainer.data.loading import Loader
from trainer.errors import ConfigError, DataError

IMAGE_CHANNELS = (1, 3, 4)


def first_inputs(train: Loader, evaluated: Mapping[str, Loader]) -> Any:
    """The first training input as the model sees it, as a batch of one.

    Raises `ConfigError` or `DataError` where a sample cannot be used, or the parts' images differ in their channels.
    """
    inputs = train.peek([train.first_id]).inputs
    channels = input_channels(inputs)
    for phase, loader in evaluated.items():
        others = input_channels(loader.peek([loader.first_id]).inputs)
        if channels != others and channels and others:
            name = "validation" if phase == "val" else phase
            raise DataError(
                f"training images have {channels} channels and {name} images {others}; give both as many, as "
                f"{{name: RGB}} or {{name: Grayscale}} in data.train_transforms and data.val_transforms do"
            )
    return inputs


def channels_note(inputs: Any) -> str:
    """What a run's header says of images whose channels seem to lie last, as NumPy's often do; "" for others."""
    if input_channels(inputs) is None:
        return ""
    first, height, last = inputs.shape[1:]
    is_last = last in IMAGE_CHANNELS and first not in IMAGE_CHANNELS
    if not is_last or height <= max(IMAGE_CHANNELS):
        return ""  # such as features of 4 × 4 places
    return (
        f"inputs {tuple(inputs.shape[1:])} are taken for images of {first} channels and {height} × {last} pixels; if "
        f"their channels lie last, let the data set return (C, H, W), as {{name: ToImage}} makes it of an array"
    )


def check_classes(task: Task, num_classes: int | None, data: Datasets) -> None:
    """Raise `ConfigError` for a classifier with one class: its loss is 0 whatever it answers."""
    if num_classes == 1 and isinstance(task, CrossEntropy):
        names = (
            f"{data.name} has the class {data.classes[0]} alone"
            if data.classes
            else "it is 1"
        )
        raise ConfigError(
            "model.num_classes",
            f"{names}, so there is nothing to tell apart; give data of two classes or more, each in a folder of its "
            f"own, or set loss.name=bce_with_logits for a question of yes or no",
        )
