"""Class names: those of a data set beside those that a model was trained on."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from trainer.data.conversion import as_pair
from trainer.data.datasets import Datasets, ImageArrays, MapDataset
from trainer.data.folder import ImageFolder
from trainer.data.labelled_images import LabelledImages
from trainer.data.names import normal_form
from trainer.errors import ConfigError, DataError, nearest


def with_classes(data: Datasets, classes: Sequence[str]) -> Datasets:
    """The data with the class ids of a model that knows `classes`, matched by name.

    Data without class names stay as they are. Raises `ConfigError` for a class that the model does not know.
    """
    own = None if data.classes is None else [normal_form(name) for name in data.classes]
    known = [normal_form(name) for name in classes]
    if own is None or own == known:
        return data
    unknown = [name for name in own if name not in known]
    if unknown:
        raise ConfigError(
            "data.root" if isinstance(data.train, ImageFolder) else "data.name",
            f"the data have the class {', '.join(unknown)}, which the model was not trained on; it knows "
            f"{', '.join(known)}{nearest(unknown[0], known)}",
        )
    if len(set(known)) < len(known):
        raise ConfigError(
            "data.name",
            "the model's class names are not unique, so those of the data cannot be matched to them",
        )
    new_ids = [known.index(name) for name in own]

    def relabel(part: MapDataset) -> MapDataset:
        return _relabel(part, new_ids, len(known))

    return replace(
        data,
        train=relabel(data.train),
        val=None if data.val is None else relabel(data.val),
        classes=list(classes),
        named={name: relabel(part) for name, part in data.named.items()},
        test=None if data.test is None else relabel(data.test),
    )


class Relabelled:
    """A data set whose class ids are replaced: id `i` becomes `new_ids[i]`."""

    def __init__(self, dataset: MapDataset, new_ids: list[int]) -> None:
        self.dataset = dataset
        self.new_ids = new_ids
        paths = getattr(dataset, "paths", None)
        if paths is not None:
            self.paths = paths

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, target = as_pair(self.dataset[index], f"sample {index}")
        try:
            return image, self.new_ids[int(target)]
        except (TypeError, ValueError, RuntimeError, IndexError):
            raise DataError(
                f"sample {index}: its target is no class id of the data, so it cannot be matched by name to the "
                f"model's classes; give the data the model's classes, in its order"
            ) from None


def _new(target: Any, new_ids: list[int]) -> Any:
    """A class id, or a list of them, of the model's."""
    if isinstance(target, list):
        return [new_ids[item] for item in target]
    return new_ids[target]


def _relabel(dataset: MapDataset, new_ids: list[int], class_count: int) -> MapDataset:
    if isinstance(dataset, ImageFolder):
        relabelled = copy.copy(dataset)
        relabelled.targets = [_new(target, new_ids) for target in dataset.targets]
        if isinstance(relabelled, LabelledImages) and relabelled.class_count:
            relabelled.class_count = class_count
        return relabelled
    if isinstance(dataset, ImageArrays) and dataset.targets.dim() == 1:
        return replace(dataset, targets=torch.tensor(new_ids)[dataset.targets])
    return Relabelled(dataset, new_ids)
