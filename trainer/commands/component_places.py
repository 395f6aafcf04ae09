"""Where a config names components, and the short names that it knows there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

# Of torchmetrics, the modules that a bare class name is looked for in.
METRIC_MODULES = (
    "torchmetrics",
    "torchmetrics.classification",
    "torchmetrics.detection",
    "torchmetrics.segmentation",
)


class Place(NamedTuple):
    """Where a config names components of a kind.

    `names` are the short ones; of the arguments, the first `positional` and those called `supplied` come from the run,
    as do those called `filled` where the config does not give them.
    """

    names: Callable[[], Mapping[str, Any]]
    positional: int = 0
    supplied: tuple[str, ...] = ()
    filled: tuple[str, ...] = ()


def _optimizers() -> Mapping[str, Any]:
    from trainer.components.optimizer import OPTIMIZERS

    return OPTIMIZERS


def _schedules() -> Mapping[str, Any]:
    from trainer.components.schedule import CURVES

    return CURVES


def _losses() -> Mapping[str, Any]:
    from trainer.components.task import TASKS

    return TASKS


def _models() -> Mapping[str, Any]:
    from torchvision import models

    from trainer.components.models import SMALL_MODELS

    builders = {name: models.get_model_builder(name) for name in models.list_models()}
    return {**SMALL_MODELS, **builders}


def _data_sets() -> Mapping[str, Any]:
    from trainer.data.datasets import MAKERS

    return MAKERS


def _samplers() -> Mapping[str, Any]:
    from trainer.data.samplers import SAMPLERS

    return SAMPLERS


def _transforms() -> Mapping[str, Any]:
    from trainer.data.transforms import transforms_by_name

    return transforms_by_name()


def _batch_transforms() -> Mapping[str, Any]:
    from trainer.data.batch_transforms.build import BATCH_TRANSFORMS

    return BATCH_TRANSFORMS


def _observers() -> Mapping[str, Any]:
    from trainer.core.save_predictions import SHORT_NAMES

    return SHORT_NAMES


def _trackers() -> Mapping[str, Any]:
    from trainer.reporting.trackers.group import KINDS

    return KINDS


def _metrics() -> Mapping[str, Any]:
    """The metrics of torchmetrics by import path, without those that take another metric as an object."""
    from torchmetrics import Metric

    paths: dict[type, str] = {}
    for module_name in METRIC_MODULES:
        module = import_module(module_name)
        for name in module.__all__:
            target = getattr(module, name)
            is_metric = isinstance(target, type) and issubclass(target, Metric)
            if is_metric and target is not Metric and not _is_wrapper(target):
                # Several modules have the commonest; the shortest path comes first.
                paths.setdefault(target, f"{module_name}.{name}")
    return {path: metric for metric, path in paths.items()}


def _is_wrapper(metric: type) -> bool:
    return metric.__module__.startswith("torchmetrics.wrappers")


def metric_path(name: str) -> str:
    """The import path of a metric of torchmetrics from its class alone: of `F1Score`, torchmetrics.F1Score."""
    if "." in name:
        return name
    for path in _metrics():
        if path.rpartition(".")[2] == name:
            return path
    return name


PLACES = {
    "data": Place(
        _data_sets, supplied=("train", "split", "reading", "needs_val", "is_split")
    ),
    "data.sampler": Place(_samplers, positional=1),
    "data.train_transforms": Place(_transforms),
    "data.val_transforms": Place(_transforms),
    "data.batch_transforms": Place(_batch_transforms),
    "model": Place(_models),
    "loss": Place(_losses, supplied=("num_classes",)),
    "optimizer": Place(_optimizers, positional=1),
    "schedule": Place(_schedules, positional=1),
    "metrics": Place(
        _metrics,
        filled=("num_classes", "num_labels", "task", "ignore_index", "input_format"),
    ),
    "observers": Place(_observers),
    "trackers": Place(_trackers),
}
