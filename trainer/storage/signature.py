"""A model's input and output, kept beside its weights so that the model can be used without its data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.data.conversion import input_as_tensor
from trainer.data.loading import Loader
from trainer.errors import LockstepError

FILE = "signature.json"


@dataclass(frozen=True)
class Signature:
    """Attributes:

    - `channels`: of an image as the data set gives it, before any transform; None if it is no image.
    - `shape` and `dtype`: of an input after the validation transforms, without the batch; None if it is no tensor.
    - `num_classes`: outputs of the model.
    - `classes`: names of the first classes, None if the data has none.
    """

    channels: int | None
    shape: list[int] | None
    dtype: str | None
    num_classes: int | None
    classes: list[str] | None

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
    inputs = loader.fetch([loader.first_id]).inputs
    shape = dtype = None
    if isinstance(inputs, Tensor):
        shape = list(inputs.shape[1:])
        dtype = str(inputs.dtype).removeprefix("torch.")
    channels = _count_channels(loader.raw(loader.first_id))
    return Signature(channels, shape, dtype, num_classes, classes)


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
    return f" · its head is for {_first_few(trained_on)}, not for {_first_few(classes)}"


def _first_few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def _count_channels(image: Any) -> int | None:
    """Channels of a tensor `(C, H, W)` or `(H, W)`, an array or a PIL image; None for anything else."""
    image = input_as_tensor(image)
    if isinstance(image, Tensor) and image.dim() == 3:
        return image.shape[0]
    if isinstance(image, Tensor) and image.dim() == 2:
        return 1
    return None
