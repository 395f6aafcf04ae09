"""The named validation sets and the test set, each from its own part of the config, or as they are passed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.config.data_section import DataConfig
from trainer.config.evaluation_sets import (
    EvaluationSetConfig,
    test_set,
    validation_sets,
)
from trainer.config.fields import declared_keys
from trainer.config.registry import resolve
from trainer.data.classes import with_classes
from trainer.data.datasets import (
    MAKERS,
    Datasets,
    MapDataset,
    build_datasets,
)
from trainer.data.folder import evaluation_folder
from trainer.data.image_reading import ImageReading
from trainer.data.imported import evaluation_part
from trainer.data.labelled_images import labelled_part
from trainer.data.parts import check_part, class_names, shared_class_names
from trainer.data.rows import as_pairs
from trainer.errors import ConfigError

# The arguments of data.name=folder with the names of its folders.
FOLDERS = {"train": "train_folder", "val": "val_folder"}
MainFirst = Callable[[], AbstractContextManager[None]]


def with_evaluation_sets(
    section: DataConfig, data: Datasets, main_first: MainFirst
) -> Datasets:
    """`data` with the sets that `data.val` and `data.test` name. Raises `ConfigError` or `DataError`."""
    notes = [data.note]

    def made(place: str, item: EvaluationSetConfig) -> MapDataset:
        part, note = _set(section, data, place, item, main_first)
        notes.append(note and f"{place}: {note}")
        return part

    named = {}
    for name, item in validation_sets(section.val).items():
        named[name] = made(f"data.val.{name}", item)
    of_test = test_set(section.test)
    test = None if of_test is None else made("data.test", of_test)
    if not named and test is None:
        return data
    return replace(
        data,
        val=next(iter(named.values()), data.val),
        named=named,
        test=test,
        note="; ".join(filter(None, notes)),
    )


def _set(
    section: DataConfig,
    data: Datasets,
    place: str,
    item: EvaluationSetConfig,
    main_first: MainFirst,
) -> tuple[MapDataset, str]:
    """One set, whose class ids are those of the training data, and a note on the files left out."""
    if item.is_plain:
        if data.val is None:
            raise ConfigError(
                place,
                f"{data.name} has no validation part; name another data set, or give arguments that select one",
            )
        return data.val, ""
    for name in item.args.keys() & declared_keys(DataConfig).keys():
        raise ConfigError(f"{place}.{name}", f"holds for all sets, as data.{name}")
    own = _section_of_set(section, item)
    if own.name == "folder" and own.args.get("labels") is not None:
        return _labelled(own, data, place, item)
    if own.name == "folder":
        return _folder(own, data, place, item)
    if item.folder is not None:
        raise ConfigError(
            f"{place}.folder", f"is for data.name=folder, not for {own.name}"
        )
    with _keys_within(place):
        return _another(own, data, item, main_first), ""


@contextmanager
def _keys_within(place: str) -> Iterator[None]:
    """What builds a data set names the keys of `data`; its errors name those of the set at `place`."""
    try:
        yield
    except ConfigError as error:
        inner = error.key.removeprefix("data")
        raise ConfigError(f"{place}{inner}", error.message) from None


def _root_of(own: DataConfig, place: str) -> Path:
    if own.root is None:
        raise ConfigError(f"{place}.root", "is not set; folder needs a folder")
    return Path(own.root).expanduser()


def _section_of_set(section: DataConfig, item: EvaluationSetConfig) -> DataConfig:
    """The section `data` of the set's own data set."""
    is_same = item.name in ("", section.name)
    return replace(
        section,
        name=item.name or section.name,
        root=item.root if item.root is not None or not is_same else section.root,
        args=section.args | item.args if is_same else item.args,
        cache=0.0,
        val_fraction=None,
        val={},
        test=None,
    )


def _folder(
    own: DataConfig, data: Datasets, place: str, item: EvaluationSetConfig
) -> tuple[MapDataset, str]:
    for name in own.args.keys() - {"labels", *FOLDERS.values()}:
        raise ConfigError(f"{place}.{name}", "folder has no such argument")
    root = _root_of(own, place)
    if data.classes is None:
        raise ConfigError(
            f"{place}.name",
            f"{data.name} has no class names, by which class folders are matched",
        )
    own_part = item.part or "val"
    part = item.folder or own.args.get(FOLDERS[own_part]) or own_part
    return evaluation_folder(root, part, data.classes, ImageReading.of(own), key=place)


def _labelled(
    own: DataConfig, data: Datasets, place: str, item: EvaluationSetConfig
) -> tuple[MapDataset, str]:
    if item.folder is not None:
        raise ConfigError(
            f"{place}.folder", "says nothing beside labels, which name each image"
        )
    root = _root_of(own, place)
    with _keys_within(place):
        return labelled_part(
            root, own.args["labels"], data.classes, ImageReading.of(own)
        )


def _another(
    own: DataConfig, data: Datasets, item: EvaluationSetConfig, main_first: MainFirst
) -> MapDataset:
    """A part of the data set that `own` describes, its classes matched by name."""
    part: MapDataset | None
    if own.name in MAKERS:
        made = build_datasets(own, main_first)
        part = made.train if item.part == "train" else made.val
        classes = made.classes
    else:
        target = resolve("data", own.name, MAKERS)
        part = evaluation_part(own, target, is_train=item.part == "train")
        check_part(own.name, "evaluated", part)
        part = as_pairs(part, own.columns)
        classes = class_names(part)
    assert part is not None
    if data.classes is None or classes is None:
        return part
    return with_classes(Datasets(part, None, classes, own.name), data.classes).train


def passed_sets(data: Datasets, val: Any, test: Any) -> Datasets:
    """`data` with what was passed to a `Trainer` as `val_data`, one set or a dict of named ones, and `test_data`."""
    if type(val) is dict:
        named = {str(name): part for name, part in val.items()}
        validation_sets(dict.fromkeys(named))  # checks the names
        for name, part in named.items():
            _check_passed(data, f"val_data[{name!r}]", part)
        if not named:
            raise ConfigError(
                "val_data", "is an empty dict; give a set, or leave it out"
            )
        data = replace(data, val=next(iter(named.values())), named=named)
    elif val is not None:
        _check_passed(data, "val_data", val)
        data = replace(data, val=val)
    if test is not None:
        _check_passed(data, "test_data", test)
        data = replace(data, test=test)
    return data


def with_columns(data: Datasets, columns: list[Any] | None) -> Datasets:
    """The sets of rows as sets of pairs (see `trainer.data.rows`)."""
    return replace(
        data,
        val=as_pairs(data.val, columns),
        named={name: as_pairs(part, columns) for name, part in data.named.items()},
        test=as_pairs(data.test, columns),
    )


def _check_passed(data: Datasets, key: str, part: Any) -> None:
    kind = "test" if key == "test_data" else "validation"
    check_part(type(part).__name__, kind, part, key=key)
    shared_class_names(data.train, part)


def refuse_sets_of_config(section: DataConfig) -> None:
    """Raise `ConfigError` where `data.val` or `data.test` name sets beside data that are passed."""
    given: Mapping[str, Any] = {"data.val": section.val, "data.test": section.test}
    for key, value in given.items():
        if value:
            argument = "val_data={name: set}" if key == "data.val" else "test_data"
            raise ConfigError(
                key, f"names sets, and train_data is passed; pass {argument}, too"
            )
