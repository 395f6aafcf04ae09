"""Sums of single micro-batches, kept apart on the device until the host adds them up without rounding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

Scalar = Tensor | float
Column = Tensor | list[float]


class SeparateSums:
    """Rows of numbers and 0-dim tensors, one row for each micro-batch.

    Rows that come together are kept by column. A column of tensors is one operation on the device, and one of plain
    numbers is none.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device
        self._blocks: list[list[Column]] = []

    def add(self, rows: Sequence[Sequence[Scalar]]) -> None:
        """Add some rows, all of one length."""
        self._blocks.append(
            [self._column(values) for values in zip(*rows, strict=True)]
        )

    def copy(self) -> SeparateSums:
        """The same rows, to which others may be added."""
        other = SeparateSums(self._dtype, self._device)
        other._blocks = list(self._blocks)
        return other

    def read(self) -> list[list[float]]:
        """All rows in turn. Waits for the device once."""
        on_device: list[Tensor] = []
        for block in self._blocks:
            on_device += [column for column in block if isinstance(column, Tensor)]
        # Copied together: each copy by itself would be a wait of its own.
        values = iter(torch.cat(on_device).tolist() if on_device else ())
        rows: list[list[float]] = []
        for block in self._blocks:
            columns = []
            for column in block:
                if isinstance(column, Tensor):
                    columns.append(list(islice(values, len(column))))
                else:
                    columns.append(column)
            for row in zip(*columns, strict=True):
                # A sum of -0.0 is one of nothing, and reads 0.
                rows.append([value + 0.0 for value in row])
        return rows

    def _column(self, values: Sequence[Scalar]) -> Column:
        numbers = [float(value) for value in values if not isinstance(value, Tensor)]
        if len(numbers) == len(values):
            return numbers
        tensors = [value for value in values if isinstance(value, Tensor)]
        kinds = {(tensor.dtype, tensor.device) for tensor in tensors}
        if numbers or len(kinds) > 1:
            # Stacked as they are, they would take a common dtype that may round.
            tensors = [self._as_tensor(value) for value in values]
        return torch.stack(tensors).to(self._device, self._dtype)

    def _as_tensor(self, value: Scalar) -> Tensor:
        return torch.as_tensor(value, dtype=self._dtype, device=self._device)
