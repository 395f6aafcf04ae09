"""A validation part taken out of the training data (`data.val_fraction`): the same share of each class, where known.

Which samples it takes depends on their labels and `data.split_seed` alone, so it is the same on any machine, for any
`run.seed`, and when a run is resumed or evaluated. Within both parts, samples keep the order of the whole.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

from trainer.config.data_section import DataConfig
from trainer.data.datasets import Datasets, ImageArrays, MapDataset
from trainer.data.folder import ImageFolder
from trainer.data.labels import Labels, find_labels
from trainer.errors import DataError
from trainer.exact.plan import Ids
from trainer.exact.seeding import numpy_generator


class Part(Subset[Any]):
    """Some samples of a data set, by their ids there; with their paths, if the data set has them."""

    def __init__(self, dataset: MapDataset, ids: Ids) -> None:
        super().__init__(dataset, ids.tolist())  # type: ignore[arg-type]
        paths = getattr(dataset, "paths", None)
        if paths is not None:
            self.paths = [paths[index] for index in self.indices]


def with_split(section: DataConfig, data: Datasets) -> Datasets:
    """`data` with the share `data.val_fraction` of its training samples for validation, in place of its own.

    Raises `DataError` if there are too few samples for two parts.
    """
    if section.val_fraction is None:
        return data
    labels = find_labels(data.train)
    count = len(data.train)
    if count < 2:
        raise DataError(
            f"the training part of {data.name} holds {count} sample, which data.val_fraction cannot share out"
        )
    train_ids, val_ids = split_ids(
        count, labels, section.val_fraction, section.split_seed
    )
    notes = [data.note, _describe(section, data, labels, len(val_ids))]
    return replace(
        data,
        train=_part(data.train, train_ids),
        val=_part(data.train, val_ids),
        note="; ".join(filter(None, notes)),
    )


def split_ids(
    count: int, labels: Labels | None, fraction: float, seed: int
) -> tuple[Ids, Ids]:
    """The sample ids to train and to validate on, both ascending; the second are the share `fraction` of `count`.

    With `labels`, int64 `(count,)`, each class gives its share, rounded so that the sum is right, and keeps at least
    one sample to train on. If every class has one sample, labels are not regarded.
    """
    # At least one sample on either side.
    wanted = max(1, round(fraction * count))
    wanted = min(wanted, count - 1)
    # Lower numbers are taken first.
    priority = numpy_generator(seed, "data/split").permutation(count)
    strata = np.zeros(count, np.int64) if labels is None else labels
    taken = _shares(strata, wanted)
    if not taken:
        strata = np.zeros(count, np.int64)
        taken = {0: wanted}
    is_val = np.zeros(count, bool)
    for label, number in taken.items():
        ids = np.flatnonzero(strata == label)
        by_priority = np.argsort(priority[ids])
        chosen = ids[by_priority[:number]]
        is_val[chosen] = True
    return np.flatnonzero(~is_val), np.flatnonzero(is_val)


def _shares(labels: Labels, wanted: int) -> dict[int, int]:
    """How many samples of each class are taken, by largest remainders; {} if no class has two samples.

    In whole numbers, which are the same on every machine.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    size_of = dict(zip(classes.tolist(), sizes.tolist(), strict=True))
    # Each class keeps a sample to train on.
    wanted = min(wanted, len(labels) - len(size_of))
    if not wanted:
        return {}
    taken: dict[int, int] = {}
    remainders: dict[int, int] = {}
    for label, size in size_of.items():
        quotient, remainders[label] = divmod(wanted * size, len(labels))
        taken[label] = min(quotient, size - 1)
    # The largest remainder first; of equal ones, the lower class.
    by_remainder = sorted(size_of, key=lambda label: (-remainders[label], label))
    missing = wanted - sum(taken.values())
    while missing:
        open_classes = []
        for label in by_remainder:
            if taken[label] < size_of[label] - 1:
                open_classes.append(label)
        for label in open_classes[:missing]:
            taken[label] += 1
        missing = wanted - sum(taken.values())
    return taken


def _part(dataset: MapDataset, ids: Ids) -> MapDataset:
    if isinstance(dataset, ImageFolder):
        return dataset.select(ids.tolist())
    if isinstance(dataset, ImageArrays):
        index = torch.from_numpy(ids)
        return ImageArrays(dataset.images[index], dataset.targets[index])
    return Part(dataset, ids)


def _describe(
    section: DataConfig, data: Datasets, labels: Labels | None, val: int
) -> str:
    """How validation samples were chosen, for the run's header."""
    how = (
        "whatever their classes, which the data set does not tell without reading samples"
        if labels is None
        else "the same share of each class"
    )
    note = (
        f"validation is {val:,} of the {len(data.train):,} training samples, {how} "
        f"(data.val_fraction={section.val_fraction:g}, data.split_seed={section.split_seed})"
    )
    if data.val is not None:
        note += f"; the {len(data.val):,} validation samples of {data.name} itself are not used"
    return note
