"""Why some samples make no batch, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import default_collate

from trainer.data.conversion import describe_parts
from trainer.errors import DataError, first_line
from trainer.exact.plan import Ids


def why_no_batch(
    samples: Sequence[tuple[Any, Any]],
    ids: Ids,
    error: Exception,
    *,
    label: str,
    name: Callable[[int], str],
    transforms_key: str,
    advice_on_sizes: str = "",
) -> DataError:
    """The first sample that is not like the one before it, or that is of no kind that has batches.

    `error` is what `default_collate` raised for `samples`. Messages call them `label`, and one of them by `name`.
    `advice_on_sizes` is what else makes one size of images of several.
    """
    for index, part in ((0, "input"), (1, "target")):
        values = [sample[index] for sample in samples]
        try:
            default_collate(values)
        except Exception as reason:
            other = _first_unlike(values)
            if other is None:
                first = name(int(ids[0]))
                return _of_no_kind(part, values[0], first, reason)
            are_images = part == "input" and isinstance(values[0], Tensor)
            remedy = _remedy_for_sizes(transforms_key if are_images else None)
            if are_images:
                remedy += advice_on_sizes
            return DataError(
                f"{label} samples do not fit into one batch: the {part} of sample {ids[0]} is "
                f"{describe_parts(values[0])}, that of sample {ids[other]} {describe_parts(values[other])}; {remedy}"
            )
    return DataError(f"{label} samples make no batch: {error}")


def _first_unlike(values: Sequence[Any]) -> int | None:
    """The index of the first value of another kind or shape than the first; None if all are alike."""
    first = describe_parts(values[0])
    for index, value in enumerate(values):
        if describe_parts(value) != first:
            return index
    return None


def _of_no_kind(part: str, value: Any, sample: str, error: Exception) -> DataError:
    remedy = "return a tensor, or a dict of tensors"
    if part == "target":
        remedy = "return a number or a tensor; where there is no target, return 0"
    return DataError(
        f"{sample}: its {part} is {describe_parts(value)}, of which no batch can be made ({first_line(error)}); "
        f"{remedy}, or name a function in data.collate that makes the batch"
    )


def _remedy_for_sizes(transforms_key: str | None) -> str:
    """What to do about samples of several sizes; with the key of their transforms, if they are images."""
    if transforms_key is not None:
        return f"set {transforms_key} to give all one shape, as {{name: Resize, size: [224, 224]}} does"
    return (
        "pad each to one length in the data set, and leave the padding out of the loss, or name a function in "
        "data.collate that makes the batch (data.collate=lists keeps each sample by itself)"
    )
