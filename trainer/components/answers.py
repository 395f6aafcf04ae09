"""What a trained model answers: the same for `predict`, for an exported program, and in Python."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

AnswerKind = Literal["class", "labels", "values", "class_map", "boxes"]


@dataclass(frozen=True)
class Answer:
    """The answers for N samples, or for one of them.

    - `class`: one class of several. `values` are probabilities, `(N, C)`.
    - `labels`: each label yes or no by itself. `values` are probabilities, `(N, L)`.
    - `values`: numbers, `(N, …)`, in the targets' unit.
    - `class_map`: a class for each pixel. `values` are probabilities, `(N, C, H, W)`.
    - `boxes`: objects with a box each. `values` are a list of N tables `(K, 6)`: x1, y1, x2, y2 in pixels of the image
      that the model got, the score, and the class id.

    The answer for one sample lacks the N.
    """

    kind: AnswerKind
    values: Any  # a tensor; a list of them for boxes

    def samples(self) -> list[Answer]:
        """Each sample's own answer, float32 or float64 on the CPU."""
        values = self.values
        # All at once: boxes are a list, whose tables differ in length.
        if isinstance(values, Tensor):
            values = _on_host(values)
        return [Answer(self.kind, _on_host(value)) for value in values]


def _on_host(value: Tensor) -> Tensor:
    value = value.cpu()
    return value.float() if value.dtype.itemsize < 4 else value
