"""Rows with named columns, as Hugging Face's `datasets` gives them, as pairs of an input and a target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trainer.data.conversion import (
    IMAGE_KEYS,
    TARGET_KEYS,
    describe,
)
from trainer.errors import ConfigError, DataError

# One column, or several that a model takes by their names.
Column = str | tuple[str, ...]
EXAMPLE = "[image, label], or [[image, age], label] for several inputs by name"


class Rows:
    """A data set of rows as one of pairs: `columns` says which hold the input and the target.

    Attributes: `classes`, the names of the target's class ids, where the data set's `features` have them.
    """

    def __init__(self, dataset: Any, columns: tuple[Column, Column]) -> None:
        self.dataset = dataset
        self.columns = columns
        self.classes = _class_names(dataset, columns[1])
        paths = getattr(dataset, "paths", None)
        if paths is not None:
            self.paths = paths

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        row = self.dataset[index]
        if not isinstance(row, Mapping):
            raise DataError(
                f"data.columns names columns of a row, and sample {index} is {describe(row)}; leave data.columns out"
            )
        first, second = self.columns
        return _value(row, first, index), _value(row, second, index)


def as_pairs(dataset: Any, columns: list[Any] | None) -> Any:
    """The data set as one of pairs, where its columns are named or its features leave no doubt; else as it is.

    Raises `ConfigError` for a wrong `data.columns`.
    """
    if dataset is None or isinstance(dataset, Rows):
        return dataset
    features = getattr(dataset, "features", None)
    if not isinstance(features, Mapping):
        features = {}
    names = list(features) or None
    if columns is not None:
        return Rows(dataset, _read(columns, names))
    if names is None or _has_known_names(names):
        return dataset
    images = [name for name in names if _kind(features[name]) == "Image"]
    labels = [name for name in names if _kind(features[name]) == "ClassLabel"]
    if len(images) == 1 and len(labels) == 1:
        return Rows(dataset, (images[0], labels[0]))
    return dataset


def _has_known_names(names: Sequence[str]) -> bool:
    """True if a row says by itself what is input and what is target (see `trainer.data.conversion`)."""
    images = [name for name in IMAGE_KEYS if name in names]
    targets = [name for name in TARGET_KEYS if name in names]
    return len(images) == 1 and len(targets) == 1


def _kind(feature: Any) -> str:
    return type(feature).__name__


def _read(columns: list[Any], names: list[str] | None) -> tuple[Column, Column]:
    if len(columns) != 2:
        raise ConfigError(
            "data.columns",
            f"has {len(columns)} entries, and needs two, the input and the target: {EXAMPLE}",
        )
    read = []
    for entry in columns:
        column = tuple(entry) if isinstance(entry, list) else entry
        of_entry = column if isinstance(column, tuple) else (column,)
        if not of_entry or not all(isinstance(name, str) for name in of_entry):
            raise ConfigError(
                "data.columns", f"{entry!r} is no name of a column; {EXAMPLE}"
            )
        unknown = [name for name in of_entry if names is not None and name not in names]
        if unknown:
            raise ConfigError(
                "data.columns",
                f'the data have no column "{unknown[0]}"; they have {", ".join(names or [])}',
            )
        read.append(column)
    return read[0], read[1]


def _value(row: Mapping[str, Any], column: Column, index: int) -> Any:
    if isinstance(column, tuple):
        return {name: _value(row, name, index) for name in column}
    if column not in row:
        raise DataError(
            f"sample {index} has no column {column} (data.columns); it has {', '.join(map(str, row))}"
        )
    value = row[column]
    # What torch's collate would take for a batch of its own.
    if isinstance(value, list) and value and isinstance(value[0], int | float):
        return torch.as_tensor(value)
    return value


def _class_names(dataset: Any, column: Column) -> list[str] | None:
    features = getattr(dataset, "features", None)
    if not isinstance(features, Mapping) or not isinstance(column, str):
        return None
    names = getattr(features.get(column), "names", None)
    return list(names) if names else None
