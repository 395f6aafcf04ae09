"""What tells the samples of a data set from others', without reading a file: the bytes of its fingerprint."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, Subset

from trainer.data.bad_samples import is_bad_sample
from trainer.data.datasets import FakeImages, ImageArrays
from trainer.data.folder import ImageFolder
from trainer.data.names import normal_form, printable
from trainer.data.shapes import Shapes
from trainer.errors import DataError, data_error, may_pass
from trainer.storage.sha256 import raw_bytes

# The bytes of one column of the samples from `first` to before `end`.
Column = Callable[[int, int], bytes]

# Arrays above it are left out: hashing takes about a second for each GiB.
LARGEST_ARRAY = 2**31  # bytes
# Data sets within data sets; more would be a circle.
DEEPEST_NESTING = 5
PLAIN = (str, bytes, int, float, Path, np.generic)


def columns(dataset: Any, depth: int = 0) -> list[Column]:
    """The columns of a data set, each a function of a range of samples. Empty if nothing can be told of them.

    Made-up images: their arguments. An image folder: each file's path, size and class. Any other data set: its
    attributes with one entry for each sample (tensors, arrays, lists of plain values, data frames), and those that are
    data sets.
    """
    if depth > DEEPEST_NESTING:
        return []
    if isinstance(dataset, FakeImages):
        return [_same_everywhere(dataset.part, dataset.shape, dataset.num_classes)]
    if isinstance(dataset, Shapes):
        return [
            _same_everywhere(
                dataset.part, dataset.image_size, dataset.target, dataset.vary
            )
        ]
    if isinstance(dataset, ImageFolder):
        return [lambda first, end: _file_lines(dataset, first, end)]
    if isinstance(dataset, list | tuple):
        column = _column(dataset, len(dataset), None)
        return [] if column is None else [column]
    if isinstance(dataset, Subset):
        return _subset_columns(dataset, depth)
    return _attribute_columns(dataset, depth)


def _same_everywhere(*arguments: Any) -> Column:
    """A column whose every range is the arguments that the images are made from."""
    text = " ".join(map(str, arguments)).encode()
    return lambda first, end: text


def _file_lines(dataset: ImageFolder, first: int, end: int) -> bytes:
    lines = []
    for index in range(first, end):
        path = dataset.paths[index]
        size = _size_of_image(dataset, path)
        lines.append(f"{normal_form(path)} {size} {dataset.targets[index]}")
    return "\n".join(lines).encode()


def _size_of_image(dataset: ImageFolder, path: str) -> int:
    """The size of an image's file; -1 for one that cannot be read, in a run that leaves it out."""
    try:
        return file_size(dataset.root / path)
    except DataError as error:
        if dataset.reading.leaves_out and is_bad_sample(error):
            return -1
        raise


def file_size(path: Path) -> int:
    """The file's size in bytes. Raises `DataError` for a file that is missing, empty or not permitted."""
    try:
        size = path.stat().st_size
    except OSError as error:  # a dangling link, for example
        remedy = "" if may_pass(error) else "; remove or replace the file"
        raise data_error(
            f"{printable(path)} cannot be read ({error.strerror}){remedy}", error
        ) from None
    if not os.access(path, os.R_OK):
        raise DataError(
            f"{printable(path)} may not be read; permit it or remove the file"
        )
    if size == 0:
        raise DataError(f"{printable(path)} is empty; remove or replace the file")
    return size


def _subset_columns(dataset: Subset[Any], depth: int) -> list[Column]:
    indices = dataset.indices

    def of_chosen(column: Column) -> Column:
        def of_range(first: int, end: int) -> bytes:
            parts = [column(index, index + 1) for index in indices[first:end]]
            return b"\n".join(parts)

        return of_range

    return [of_chosen(column) for column in columns(dataset.dataset, depth + 1)]


def _attribute_columns(dataset: Any, depth: int) -> list[Column]:
    count = len(dataset)
    found: list[Column] = []
    for _, value in sorted(getattr(dataset, "__dict__", {}).items()):
        values = value if isinstance(value, list | tuple) else [value]
        if values and all(map(_is_dataset, values)):
            for inner in values:
                found += _inner_columns(inner, count, depth)
            continue
        column = _column(value, count, getattr(dataset, "root", None))
        if column is not None:
            found.append(column)
    # TensorDataset keeps its columns in a tuple; its length is theirs, not its own.
    for tensor in getattr(dataset, "tensors", ()):
        column = _column(tensor, count, None)
        if column is not None:
            found.append(column)
    return found


def _is_dataset(value: Any) -> bool:
    kinds = (Dataset, ImageArrays, ImageFolder, FakeImages)
    return isinstance(value, kinds) and hasattr(value, "__len__")


def _inner_columns(inner: Any, count: int, depth: int) -> list[Column]:
    """The columns of a data set within another; as one hash of all where its samples are not the other's."""
    of_inner = columns(inner, depth + 1)
    if len(inner) == count:
        return of_inner
    sha256 = hashlib.sha256(str(len(inner)).encode())
    for column in of_inner:
        sha256.update(column(0, len(inner)))
    whole = sha256.digest()
    return [lambda first, end: whole]


def _column(value: Any, count: int, root: Any) -> Column | None:
    """The column of an attribute; None if it has not one entry for each sample, or entries that cannot be told."""
    if isinstance(value, Tensor):
        is_column = value.dim() > 0 and len(value) == count
        if is_column and value.nbytes <= LARGEST_ARRAY:
            shape = tuple(value.shape[1:])
            kind = f"{value.dtype} {shape} ".encode()
            return lambda first, end: kind + raw_bytes(value[first:end])
    elif isinstance(value, np.ndarray):
        if _is_plain_array(value) and len(value) == count:
            kind = f"{value.dtype} {value.shape[1:]} ".encode()
            return lambda first, end: kind + value[first:end].tobytes()
    elif isinstance(value, list | tuple):
        if len(value) == count and _are_plain(value):
            return lambda first, end: _list_bytes(value[first:end], root)
    elif _is_of_pandas(value) and len(value) == count:
        return partial(_frame_bytes, value)
    return None


def _is_of_pandas(value: Any) -> bool:
    """True for a data frame or series, without an import of pandas."""
    return hasattr(value, "iloc") and hasattr(value, "to_numpy")


def _frame_bytes(frame: Any, first: int, end: int) -> bytes:
    rows = frame.iloc[first:end].to_numpy().tolist()
    return repr(rows).encode()


def _is_numeric_array(value: Any) -> bool:
    """False for arrays of objects, whose bytes are addresses."""
    return isinstance(value, np.ndarray) and value.dtype.kind in "biufcSU"


def _is_plain_array(array: np.ndarray[Any, Any]) -> bool:
    """False for arrays of objects, of files, and for those that would take long."""
    return (
        array.ndim > 0
        and _is_numeric_array(array)
        and not isinstance(array, np.memmap)
        and array.nbytes <= LARGEST_ARRAY
    )


def _are_plain(values: Sequence[Any]) -> bool:
    """True if every entry is plain, an array, or a list of such, as a path and its class or an image and its class."""
    size = 0
    for value in values:
        parts = value if isinstance(value, list | tuple) else [value]
        for part in parts:
            if isinstance(part, Tensor) or _is_numeric_array(part):
                size += part.nbytes
            elif not isinstance(part, PLAIN):
                return False
    return size <= LARGEST_ARRAY


def _list_bytes(values: Sequence[Any], root: Any) -> bytes:
    return b"\n".join(_entry_bytes(value, root) for value in values)


def _entry_bytes(value: Any, root: Any) -> bytes:
    if isinstance(value, Tensor):
        return raw_bytes(value)
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, list | tuple):
        return b" ".join(_entry_bytes(part, root) for part in value)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str | Path):
        return _without_root(str(value), root)
    return repr(value).encode()


def _without_root(text: str, root: Any) -> bytes:
    """A path below the data set's `root` relative to it: the same files may lie elsewhere on another machine."""
    if isinstance(root, str | Path):
        text = text.removeprefix(str(root))
    return text.encode(errors="surrogateescape")
