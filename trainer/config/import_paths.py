"""What a config names that is imported: every key that holds an import path, with the arguments beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from trainer.config.evaluation_sets import (
    EvaluationSetConfig,
    test_set,
    validation_sets,
)
from trainer.config.schema import Config

Role = Literal[
    "model",
    "data",
    "sampler",
    "transform",
    "collate",
    "loss",
    "optimizer",
    "schedule",
    "metric",
    "observer",
]
# Roles whose sections are named after them.
SECTIONS: tuple[Role, ...] = ("model", "data", "loss", "optimizer", "schedule")


class ImportPath(NamedTuple):
    """An import path of a config: `section` is the dotted key of what it names, whose `name` it is."""

    role: Role
    section: str
    name: str
    arguments: Mapping[str, Any]

    @property
    def key(self) -> str:
        return self.section if self.role == "collate" else f"{self.section}.name"

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]


def import_paths(config: Config) -> Iterator[ImportPath]:
    """Every import path in `config`. Names without a dot are Lockstep's own or torchvision's, and are left out."""
    for path in _all_names(config):
        if "." in path.name:
            yield path


def _all_names(config: Config) -> Iterator[ImportPath]:
    for role in SECTIONS:
        section = getattr(config, role)
        yield ImportPath(role, role, section.name, section.args)
    yield from _sampler(config.data.sampler)
    for key in ("train_transforms", "val_transforms", "batch_transforms"):
        yield from _transforms(f"data.{key}", getattr(config.data, key))
    for place, section in _evaluation_sets(config):
        if section.name:
            yield ImportPath("data", place, section.name, section.args)
        elif section.args:
            # They go to the data set of `data`.
            yield ImportPath("data", place, config.data.name, section.args)
        yield from _transforms(f"{place}.transforms", section.transforms)
    if config.data.collate is not None:
        yield ImportPath("collate", "data.collate", config.data.collate, {})
    for index, metric in enumerate(config.metrics):
        yield ImportPath("metric", f"metrics[{index}]", metric.name, metric.args)
    for index, observer in enumerate(config.observers):
        yield ImportPath(
            "observer", f"observers[{index}]", observer.name, observer.args
        )


def _sampler(sampler: Mapping[str, Any]) -> Iterator[ImportPath]:
    name = sampler.get("name")
    if isinstance(name, str):
        arguments = {key: value for key, value in sampler.items() if key != "name"}
        yield ImportPath("sampler", "data.sampler", name, arguments)


def _evaluation_sets(config: Config) -> Iterator[tuple[str, EvaluationSetConfig]]:
    """Each with the key that it stands at."""
    for name, section in validation_sets(config.data.val).items():
        yield f"data.val.{name}", section
    test = test_set(config.data.test)
    if test is not None:
        yield "data.test", test


def _transforms(key: str, tree: Any) -> Iterator[ImportPath]:
    """Every mapping with a `name`, however deep: some transforms take others."""
    if isinstance(tree, list):
        for index, item in enumerate(tree):
            yield from _transforms(f"{key}[{index}]", item)
    elif isinstance(tree, Mapping):
        arguments = {name: value for name, value in tree.items() if name != "name"}
        if isinstance(tree.get("name"), str):
            yield ImportPath("transform", key, tree["name"], arguments)
        for name, value in arguments.items():
            yield from _transforms(f"{key}.{name}", value)
