"""The images of a data set have one range: all bytes, or all floats.

Bytes are scaled to [0, 1], floats are not. torch makes floats of a batch that holds both, in which a byte of 255 lies
beside a float of 1. So a sample's scale would depend on who shares its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.errors import DataError
from trainer.exact.plan import Ids
from trainer.exact.structures import dtype_name

SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)


class OneRange:
    """Compares the inputs of samples with the first one that this process has read."""

    def __init__(self) -> None:
        self._first_id: int | None = None
        self._dtype: torch.dtype | None = None

    def check(
        self, samples: Sequence[tuple[Any, Any]], ids: Ids, name: Callable[[int], str]
    ) -> None:
        """Raise `DataError` if the input tensors have several ranges; `name` says what a message calls a sample."""
        for position, (value, _) in enumerate(samples):
            if not isinstance(value, Tensor) or value.dtype == self._dtype:
                continue
            if self._dtype is None:
                self._dtype = value.dtype
                self._first_id = int(ids[position])
            elif _range(value.dtype) != _range(self._dtype):
                assert self._first_id is not None
                raise DataError(
                    f"{name(int(ids[position]))}: its input is {dtype_name(value.dtype)}, and that of "
                    f"{name(self._first_id)} {dtype_name(self._dtype)}; bytes are scaled to [0, 1] and floats are not, "
                    f"so give all one type"
                )


def _range(dtype: torch.dtype) -> object:
    """Equal for types whose numbers mean the same in a batch of both."""
    if dtype.is_floating_point:
        return "floats"
    return "whole numbers" if dtype in SIGNED else dtype
