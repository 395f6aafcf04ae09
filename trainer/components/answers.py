"""What a trained model answers: the same for `predict`, for an exported program, and in Python."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

AnswerKind = Literal["class", "labels", "values", "class_map"]


@dataclass(frozen=True)
class Answer:
    """The answers for N samples, or for one of them.

    - `class`: one class of several. `values` are probabilities, `(N, C)`.
    - `labels`: each label yes or no by itself. `values` are probabilities, `(N, L)`.
    - `values`: numbers, `(N, …)`, in the targets' unit.
    - `class_map`: a class for each pixel. `values` are probabilities, `(N, C, H, W)`.

    The answer for one sample lacks the N.
    """

    kind: AnswerKind
    values: Tensor

    def samples(self) -> list[Answer]:
        """Each sample's own answer, float32 or float64 on the CPU."""
        values = self.values.cpu()
        if values.dtype.itemsize < 4:
            values = values.float()
        return [Answer(self.kind, value) for value in values]
