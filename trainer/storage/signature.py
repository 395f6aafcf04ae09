"""A model's input and output, kept beside its weights so that the model can be used without its data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trainer.data.conversion import input_as_tensor
from trainer.data.loading import Loader
from trainer.data.normalize import are_images
from trainer.errors import LockstepError, first_few
from trainer.exact.structures import dtype_name

FILE = "signature.json"


@dataclass(frozen=True)
class Signature:
    """Attributes:

    - `channels`: of an image as the data set gives it, before any transform; None if it is no image.
    - `shape` and `dtype`: of an input after the validation transforms, without the batch; None if it is no tensor. Of
      images in a list (`form`), those of the first one.
    - `num_classes`: outputs of the model.
    - `classes`: names of the first classes, None if the data has none.
    - `form`: what a batch of inputs is: one tensor, a list of images, tensors by name, or anything else.
    - `parts`: of named tensors, the shape and dtype of each, without the batch.
    """

    channels: int | None
    shape: list[int] | None
    dtype: str | None
    num_classes: int | None
    classes: list[str] | None
    form: Literal["tensor", "list", "named", "other"] = "tensor"
    parts: dict[str, dict[str, Any]] | None = None

    def name(self, class_id: int) -> str:
        """The name of a class, or its number if it has none."""
        if self.classes and class_id < len(self.classes):
            return self.classes[class_id]
        return str(class_id)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def signature_of_samples(
    loader: Loader, *, num_classes: int | None, classes: list[str] | None
) -> Signature:
    """The signature of a model for the samples of `loader`, read off the first of them."""
    first = loader.first_id
    inputs = loader.fetch([first]).inputs
    if loader.batch_transforms is not None:
        # Without validation data: the model sees the size that these give.
        shape = loader.peek([first]).inputs.shape
        inputs = torch.empty(shape, dtype=inputs.dtype, device="meta")
    known: dict[str, Any] = {
        "num_classes": num_classes,
        "classes": classes,
        "channels": _count_channels(loader.raw(first)),
    }
    if isinstance(inputs, Tensor):
        return Signature(**known, **_of_rows(inputs), form="tensor")
    nothing: dict[str, Any] = {"shape": None, "dtype": None}
    if are_images(inputs) and loader.dataset.collation is not None:
        batch_of_one = inputs[0][None]
        return Signature(**known, **_of_rows(batch_of_one), form="list")
    if isinstance(inputs, Mapping) and _are_named_rows(inputs):
        parts = {name: _of_rows(value) for name, value in inputs.items()}
        return Signature(**known, **nothing, form="named", parts=parts)
    return Signature(**known, **nothing, form="other")


def _of_rows(rows: Tensor) -> dict[str, Any]:
    """Shape and dtype of one row."""
    dtype = dtype_name(rows.dtype)
    return {"shape": list(rows.shape[1:]), "dtype": dtype}


def _are_named_rows(inputs: Mapping[Any, Any]) -> bool:
    """True for tensors with a row for each sample, by names."""
    for name, value in inputs.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            return False
        if not value.dim():
            return False
    return bool(inputs)


def read(best: Path) -> Signature:
    """The signature in `best/`. Raises `LockstepError` if it cannot be read."""
    path = best / FILE
    try:
        return Signature(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise LockstepError(
            f"{path} cannot be read ({error}); make the run again"
        ) from error


def describe_other_classes(weights: Path, classes: list[str] | None) -> str:
    """What to add to a note on weights of a run's `best/` whose head fits, but is for other classes than `classes`."""
    best = weights.parent
    if not classes or not (best / FILE).is_file():
        return ""
    trained_on = read(best).classes
    if not trained_on or len(trained_on) != len(classes) or trained_on == classes:
        return ""
    return f" · its head is for {first_few(trained_on, 5)}, not for {first_few(classes, 5)}"


def _count_channels(image: Any) -> int | None:
    """Channels of a tensor `(C, H, W)` or `(H, W)`, an array, a PIL image, or the only one in a dict; else None."""
    if isinstance(image, Mapping):
        images = []
        for value in image.values():
            tensor = input_as_tensor(value)
            if isinstance(tensor, Tensor) and tensor.dim() == 3:
                images.append(tensor)
        return images[0].shape[0] if len(images) == 1 else None
    image = input_as_tensor(image)
    if not isinstance(image, Tensor):
        return None
    if image.dim() == 3:
        return image.shape[0]
    return 1 if image.dim() == 2 else None
