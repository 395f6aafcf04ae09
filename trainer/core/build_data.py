"""The data sets of a run: those of its config, or those passed to the `Trainer`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from trainer.config.schema import Config
from trainer.core.decoded_images import with_decoded_images
from trainer.data.datasets import Datasets, MapDataset, build_datasets
from trainer.data.evaluation_sets import (
    passed_sets,
    refuse_sets_of_config,
    with_columns,
    with_evaluation_sets,
)
from trainer.data.parts import check_part, shared_class_names
from trainer.data.rows import as_pairs
from trainer.data.split import with_split
from trainer.errors import ConfigError
from trainer.process.ranks import Ranks


def run_data(
    config: Config,
    ranks: Ranks,
    train: MapDataset | None,
    val: MapDataset | Mapping[str, MapDataset] | None,
    test: MapDataset | None,
) -> Datasets:
    """The data that the config names, or those that were passed."""
    if train is None:
        for key, given in (("val_data", val), ("test_data", test)):
            if given is not None:
                raise ConfigError(
                    key,
                    "is given without train_data, and would replace half of the data that the config names; give both",
                )
        data = build_datasets(config.data, ranks.main_first)
        data = with_split(config.data, data)
        data = with_evaluation_sets(config.data, data, ranks.main_first)
        return with_decoded_images(config.data, ranks, data)
    refuse_sets_of_config(config.data)
    if config.data.cache:
        raise ConfigError(
            "data.cache",
            "keeps the images of data.name=folder, not of a train_data that is passed; leave it out",
        )
    if config.data.short_side not in ("auto", "full"):
        raise ConfigError(
            "data.short_side",
            "is for the images of data.name=folder, not for a train_data that is passed; leave it out",
        )
    check_part(type(train).__name__, "training", train, key="train_data")
    if val is not None and config.data.val_fraction is not None:
        raise ConfigError(
            "data.val_fraction",
            "takes validation samples out of train_data, and val_data is given; leave one out",
        )
    train = as_pairs(train, config.data.columns)
    data = Datasets(train, None, shared_class_names(train, None), config.data.name)
    data = with_columns(passed_sets(data, val, test), config.data.columns)
    return with_split(config.data, data)


def with_notes(config: Config, data: Datasets) -> Datasets:
    """The data with a note on transforms that nothing goes through."""
    if data.val is not None or not config.data.val_transforms:
        return data
    note = "data.val_transforms has no effect: there are no validation data"
    return replace(data, note="; ".join(filter(None, [data.note, note])))


def count_classes(config: Config, data: Datasets) -> int | None:
    """The number of the model's outputs: the config's, else that of the data's classes, else None."""
    outputs = config.model.num_classes
    classes = len(data.classes or [])
    if (
        outputs is not None
        and outputs < classes
        and config.loss.name == "cross_entropy"
    ):
        raise ConfigError(
            "model.num_classes",
            f"{outputs} is less than the {classes} classes of {data.name}",
        )
    return outputs or classes or None
