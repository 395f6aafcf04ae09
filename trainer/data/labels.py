"""The class id of every training sample, without reading a sample."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from trainer.data.classes import Relabelled
from trainer.data.conversion import target_key
from trainer.data.datasets import FakeImages
from trainer.data.rows import Rows

Labels = npt.NDArray[np.int64]

# What torchvision's data sets, and those written after them, call their list of class ids.
ATTRIBUTES = ("targets", "labels")


def find_labels(dataset: Any) -> Labels | None:
    """The class ids of a data set, int64 `(samples,)`; None where they are not known without reading samples.

    They are looked for in its attribute `targets` or `labels`, in the column of Hugging Face's data sets, and in the
    data set that a `Subset`, a `ConcatDataset` or a relabelled one wraps.
    """
    if isinstance(dataset, FakeImages):
        return np.arange(dataset.size) % dataset.num_classes
    if isinstance(dataset, Subset):
        labels = find_labels(dataset.dataset)
        if labels is None:
            return None
        chosen: Labels = labels[np.asarray(dataset.indices)]
        return chosen
    if isinstance(dataset, ConcatDataset):
        return _joined([find_labels(part) for part in dataset.datasets])
    if isinstance(dataset, Relabelled):
        labels = find_labels(dataset.dataset)
        if labels is None:
            return None
        new_ids: Labels = np.asarray(dataset.new_ids)
        return new_ids[labels]
    if isinstance(dataset, Rows):
        column = _column(dataset.dataset, dataset.columns[1])
        return _as_labels(column, len(dataset))
    for name in ATTRIBUTES:
        labels = _as_labels(getattr(dataset, name, None), len(dataset))
        if labels is not None:
            return labels
    features = getattr(dataset, "features", None)
    key = target_key(features) if isinstance(features, Mapping) else None
    return _as_labels(_column(dataset, key), len(dataset))


def _joined(parts: list[Labels | None]) -> Labels | None:
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if len(known) == len(parts) else None


def _column(dataset: Any, key: object) -> Any:
    """The column `key` of a data set of Hugging Face, which reads no image."""
    if not isinstance(getattr(dataset, "features", None), Mapping):
        return None
    with suppress(Exception):  # of other people's code: the labels are then not known
        return list(dataset[key])
    return None


def _as_labels(values: Any, samples: int) -> Labels | None:
    """`values` as class ids, if they are one whole number for each sample."""
    if values is None or callable(values):
        return None
    if isinstance(values, Tensor):
        values = values.cpu()
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError):  # as of lists of several lengths
        return None
    is_whole = array.dtype.kind in "iu"
    if not is_whole or array.shape != (samples,):
        return None
    return array.astype(np.int64)
