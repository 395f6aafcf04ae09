"""Images of a label file: which part each is of, and its class, classes or numbers as a target."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from trainer.data.folder import ImageFolder, check_root
from trainer.data.image_reading import ImageReading
from trainer.data.label_file import (
    BETWEEN_LABELS,
    MAX_NAMES,
    LabelFile,
    Row,
    read_rows,
    read_settings,
    refuse_duplicates,
)
from trainer.data.names import normal_form, sort_key
from trainer.errors import ConfigError, DataError, listed, nearest


class LabelledImages(ImageFolder):
    """Images of a label file. `targets` are class ids, lists of class ids, or numbers: one, or a list of them.

    With `class_count`, a list of class ids becomes float32 `(class_count,)` of zeros and ones.
    """

    def __init__(
        self,
        root: Path,
        paths: list[str],
        targets: list[Any],
        reading: ImageReading | None = None,
        *,
        class_count: int | None = None,
    ) -> None:
        super().__init__(root, paths, targets, reading)
        self.class_count = class_count

    def _target(self, index: int) -> Any:
        target = self.targets[index]
        if not isinstance(target, list):
            return target
        if self.class_count is None:
            return torch.tensor(target, dtype=torch.float64)
        present = torch.zeros(self.class_count)
        present[target] = 1
        return present


def labelled_images(
    root: Path,
    labels: str | dict[str, Any],
    reading: ImageReading | None = None,
    *,
    needs_val: bool = True,
) -> tuple[ImageFolder, ImageFolder | None, list[str] | None, str]:
    """Training and validation images, sorted by path, class names (None for values), and a note on rows left out.

    `labels` is `data.labels`; paths are relative to `root`. Without `needs_val`, rows for validation are left out.
    Raises `ConfigError` for columns and splits that the file lacks, `DataError` for a row that cannot be used, with its
    line.
    """
    file, by_split = _read(root, labels)
    train = _rows_of(file, by_split, file.train, "train")
    val = _rows_of(file, by_split, file.val, "val") if needs_val else []
    classes = _find_classes(file, train)

    def images(part: Sequence[Row]) -> LabelledImages:
        return _images(root, file, part, classes, reading)

    used = {file.train, None}
    if needs_val:
        used.add(file.val)
    left_out = []
    for split, rows in by_split.items():
        if split not in used:
            left_out.append(f'{len(rows):,} of "{split}"')
    note = ""
    if left_out:
        note = f"rows of {file.file.name} left out: {', '.join(left_out)}"
    val_images = images(val) if needs_val else None
    return images(train), val_images, classes, note


def labelled_part(
    root: Path,
    labels: str | dict[str, Any],
    classes: list[str] | None,
    reading: ImageReading,
) -> tuple[ImageFolder, str]:
    """The images of another label file for evaluation, under the class ids of `classes`, and a note on rows left out.

    Those of `val`, or all of them if the file has no column of parts. Raises as `labelled_images`.
    """
    file, by_split = _read(root, labels)
    chosen = by_split.get(None) or _rows_of(file, by_split, file.val, "val")
    images = _images(root, file, chosen, classes, reading)
    left_out = sum(map(len, by_split.values())) - len(chosen)
    note = f"{left_out:,} rows of {file.file.name} left out" if left_out else ""
    return images, note


def _read(
    root: Path, labels: str | dict[str, Any]
) -> tuple[LabelFile, dict[str | None, list[Row]]]:
    """What `data.labels` says, and the file's rows, sorted by path, of each part; the part is None without a column."""
    check_root(root, "the images")
    file = read_settings(root, labels)
    rows = sorted(read_rows(root, file), key=lambda row: sort_key(row.path))
    refuse_duplicates(file, rows)
    by_split: dict[str | None, list[Row]] = {}
    for row in rows:
        by_split.setdefault(row.split, []).append(row)
    return file, by_split


def _images(
    root: Path,
    file: LabelFile,
    rows: Sequence[Row],
    classes: list[str] | None,
    reading: ImageReading | None,
) -> LabelledImages:
    as_target = _reader(file, classes)
    paths = [row.path for row in rows]
    targets = list(map(as_target, rows))
    class_count = len(classes or []) if file.kind == "classes" else None
    return LabelledImages(root, paths, targets, reading, class_count=class_count)


def _rows_of(
    file: LabelFile,
    by_split: dict[str | None, list[Row]],
    split: str,
    part: str,
) -> list[Row]:
    """The rows of one part. Without a column of splits, all are to train on."""
    if None in by_split:
        if part == "train":
            return by_split[None]
        raise ConfigError(
            "data.val_fraction",
            f"{file.file} does not say which images are for validation: set data.val_fraction, or name the column of "
            f"parts in data.labels.split",
        )
    rows = by_split.get(split, [])
    if not rows:
        names = [str(name) for name in by_split]
        known = f"it has {listed(sorted(names), MAX_NAMES)}" if names else "it is empty"
        raise ConfigError(
            f"data.labels.{part}",
            f'no row of {file.file} is of "{split}"; {known}{nearest(split, names)}',
        )
    return rows


def _find_classes(file: LabelFile, train: Sequence[Row]) -> list[str] | None:
    """Class names, sorted; None for values."""
    if file.kind == "value":
        return None
    if not isinstance(file.label, str):
        return file.label_columns
    found: Counter[str] = Counter()
    for row in train:
        found.update(_names(file, row))
    classes = sorted(found, key=_class_order(found))
    if not classes:
        raise DataError(f"{file.file} gives no training image a label")
    return classes


def _reader(file: LabelFile, classes: list[str] | None) -> Callable[[Row], Any]:
    """What makes a target of a row, for a model that knows `classes`."""
    if file.kind == "value":
        return lambda row: _values(file, row)
    if not isinstance(file.label, str):
        return lambda row: _marked(file, row)
    ids = {normal_form(name): index for index, name in enumerate(classes or [])}

    def as_target(row: Row) -> Any:
        targets = []
        for name in _names(file, row):
            if name not in ids:
                raise DataError(
                    f"{file.file}, line {row.line}: no training image has the label {name}{nearest(name, ids)}"
                )
            targets.append(ids[name])
        return targets[0] if file.kind == "class" else sorted(set(targets))

    return as_target


def _class_order(names: Counter[str]) -> Callable[[str], Any]:
    """By number, if all are numbers; else as text, as the names of folders."""
    if all(name.isdecimal() for name in names):
        return lambda name: (int(name), name)
    return lambda name: name


def _names(file: LabelFile, row: Row) -> list[str]:
    """The class names of a row."""
    names = []
    for text in row.labels[0].split(BETWEEN_LABELS):
        name = normal_form(text.strip())
        if name:
            names.append(name)
    if file.kind == "class" and len(names) != 1:
        problem = "no label" if not names else f"{len(names)} labels"
        raise DataError(
            f"{file.file}, line {row.line}: {row.path} has {problem}; each has one, unless data.labels.kind=classes"
        )
    return names


def _marked(file: LabelFile, row: Row) -> list[int]:
    """The ids of the columns that hold a 1, of several columns of 0 and 1."""
    values = _values(file, row)
    numbers = values if isinstance(values, list) else [values]
    for value in numbers:
        if value not in (0, 1):
            raise DataError(
                f"{file.file}, line {row.line}: {value:g} is neither 0 nor 1, which columns of classes hold"
            )
    return [index for index, value in enumerate(numbers) if value]


def _values(file: LabelFile, row: Row) -> float | list[float]:
    """The number of a row, or the numbers of several columns."""
    numbers = []
    for text in row.labels:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise DataError(f'{file.file}, line {row.line}: "{text}" is no number')
        numbers.append(number)
    return numbers[0] if isinstance(file.label, str) else numbers
