"""A CSV file that says what is in each image: paths, labels and, if it has such a column, the part of each.

path,label,split
images/1.jpg,cat,train
images/2.jpg,dog,val
"""

from __future__ import annotations

import csv
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from trainer.config.fields import show
from trainer.data.decoding import IMAGE_TYPES
from trainer.data.names import check_utf8
from trainer.errors import ConfigError, DataError, data_error, listed, nearest

KINDS = ("class", "classes", "value")
BETWEEN_LABELS = ";"
SPLIT = "split"  # the column that is taken for the part, if nothing else is said
TABBED = (".tsv", ".tab")
MAX_NAMES = 8  # in a message


@dataclass(frozen=True)
class LabelFile:
    """`data.labels`: a file, and which of its columns say what.

    Attributes:

    - `file`: CSV with a header, tabs in a .tsv; relative to `data.root`, or as it is.
    - `path`, `label`, `split`: names of columns. `label` may be several. A `split` of None is the column `split`, if
      there is one.
    - `kind`: `class` (a name), `classes` (several names, `a;b`, or columns of 0 and 1) or `value` (a number).
    - `train`, `val`: what the column `split` says of the images of each part.
    """

    file: Path
    path: str = "path"
    label: str | list[str] = "label"
    kind: Literal["class", "classes", "value"] = "class"
    split: str | None = None
    train: str = "train"
    val: str = "val"

    @property
    def label_columns(self) -> list[str]:
        return [self.label] if isinstance(self.label, str) else self.label


def read_settings(root: Path, labels: Any) -> LabelFile:
    """What `data.labels` says: a path, or a mapping of `LabelFile`'s attributes. Raises `ConfigError`."""
    settings = {"file": labels} if isinstance(labels, str) else labels
    names = [item.name for item in fields(LabelFile)]
    if not isinstance(settings, dict) or not isinstance(settings.get("file"), str):
        raise ConfigError(
            "data.labels",
            f"{show(labels)} is neither a CSV file nor a mapping such as {{file: labels.csv, label: breed}}",
        )
    for name, value in settings.items():
        if name not in names:
            raise ConfigError(
                f"data.labels.{name}",
                f"no such key{nearest(str(name), names)}; there are {', '.join(names)}",
            )
        _check_setting(name, value)
    given = Path(settings["file"]).expanduser()
    # Beside the images, or relative to where the run was started.
    is_elsewhere = given.is_file() and not (root / given).is_file()
    path = given if is_elsewhere else root / given
    file = LabelFile(**{**settings, "file": path})
    if file.train == file.val:
        raise ConfigError("data.labels.val", f'"{file.val}" is data.labels.train too')
    if file.kind == "class" and not isinstance(file.label, str):
        raise ConfigError(
            "data.labels.label",
            "is a list, and a class stands in one column; set data.labels.kind to classes or value",
        )
    return file


def _check_setting(name: str, value: Any) -> None:
    if name == "kind" and value not in KINDS:
        raise ConfigError(
            "data.labels.kind",
            f"{show(value)} is not one of {', '.join(KINDS)}{nearest(str(value), KINDS)}",
        )
    texts = value if name == "label" and isinstance(value, list) else [value]
    is_left_out = name == "split" and value is None
    if not texts or not (is_left_out or all(isinstance(text, str) for text in texts)):
        raise ConfigError(
            f"data.labels.{name}", f"{show(value)} is not text; write it in quotes"
        )


class Row(NamedTuple):
    """An image of a label file, and the line that it stands in."""

    line: int
    path: str
    labels: list[str]  # one for each of the label columns
    split: str | None


def read_rows(root: Path, file: LabelFile) -> Iterator[Row]:
    """The rows, in the file's order. Raises `ConfigError` for a column that it lacks, `DataError` for a wrong row."""
    delimiter = "\t" if file.file.suffix.lower() in TABBED else ","
    try:
        with file.file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream, delimiter=delimiter, strict=True)
            header = [name.strip() for name in next(reader, [])]
            columns = _columns(file, header)
            for entries in reader:
                if entries:  # not an empty line
                    yield _row(root, file, reader.line_num, entries, columns)
    except OSError as error:
        raise data_error(
            f"data.labels={file.file} cannot be read ({error.strerror})", error
        ) from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{file.file} is no CSV file in UTF-8: {error}") from None


class _Columns(NamedTuple):
    """How many columns there are, and the numbers of those that are read."""

    total: int
    path: int
    labels: list[int]
    split: int | None


def _columns(file: LabelFile, header: list[str]) -> _Columns:
    def column(key: str, name: str) -> int:
        if header.count(name) != 1:
            problem = "two columns" if name in header else "no column"
            raise ConfigError(
                f"data.labels.{key}",
                f'{file.file} has {problem} "{name}"; its first line names {listed(header, MAX_NAMES)}'
                f"{nearest(name, header)}",
            )
        return header.index(name)

    split = None
    if file.split is not None or SPLIT in header:
        split = column("split", file.split or SPLIT)
    labels = [column("label", name) for name in file.label_columns]
    return _Columns(len(header), column("path", file.path), labels, split)


def _row(
    root: Path, file: LabelFile, line: int, entries: list[str], columns: _Columns
) -> Row:
    where = f"{file.file}, line {line}"
    if len(entries) != columns.total:
        raise DataError(f"{where}: {len(entries)} entries, and {columns.total} columns")
    path = posixpath.normpath(entries[columns.path].strip())
    check_utf8(path)
    if not path.lower().endswith(IMAGE_TYPES):
        raise DataError(
            f'{where}: "{path}" is no image of a type that is read ({", ".join(IMAGE_TYPES)})'
        )
    if not (root / path).is_file():
        raise DataError(
            f"{where}: there is no {root / path}; paths are relative to data.root"
        )
    labels = [entries[index].strip() for index in columns.labels]
    split = None if columns.split is None else entries[columns.split].strip()
    return Row(line, path, labels, split)


def refuse_duplicates(file: LabelFile, rows: Sequence[Row]) -> None:
    """Raise `DataError` for an image with two rows: it could be in both parts."""
    lines: dict[str, int] = {}
    for row in rows:
        if row.path in lines:
            first, second = sorted((lines[row.path], row.line))
            raise DataError(
                f"{file.file}, line {second}: {row.path} stands in line {first} already; several labels of an image "
                f"go into one row, a{BETWEEN_LABELS}b, with data.labels.kind=classes"
            )
        lines[row.path] = row.line
