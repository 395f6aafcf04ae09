"""What a model takes and what its outputs stand for: kept beside its weights, so that it is of use without its data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.data.loading import Loader
from trainer.errors import LockstepError

FILE = "signature.json"


@dataclass(frozen=True)
class Signature:
    """`shape` and `dtype` are those of an input as the validation transforms leave it; None where it is no tensor.

    `channels` are those of an image as the data set gives it, before any transform; None where it is no image.
    """

    channels: int | None
    shape: list[int] | None
    dtype: str | None
    num_classes: int | None
    classes: list[str] | None

    def name(self, class_id: int) -> str:
        return self.classes[class_id] if self.classes and class_id < len(self.classes) else str(class_id)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def signature_of_samples(loader: Loader, *, num_classes: int | None, classes: list[str] | None) -> Signature:
    """The signature of a model for the samples of `loader`, taken from the first of them."""
    inputs = loader.fetch([0]).inputs
    shape, dtype = (list(inputs.shape[1:]), str(inputs.dtype)) if isinstance(inputs, Tensor) else (None, None)
    dtype = dtype and dtype.removeprefix("torch.")
    return Signature(_channels(loader.raw(0)), shape, dtype, num_classes, classes)


def read(best: Path) -> Signature:
    """The signature in `best/`."""
    try:
        return Signature(**json.loads((best / FILE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise LockstepError(f"{best / FILE} cannot be read ({error}); make the run again") from error


def _channels(image: Any) -> int | None:
    """Channels of a tensor `(C, H, W)` or `(H, W)`, or of a PIL image."""
    if isinstance(image, Tensor):
        return image.shape[0] if image.dim() == 3 else 1 if image.dim() == 2 else None
    return len(image.getbands()) if hasattr(image, "getbands") else None
