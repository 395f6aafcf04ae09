"""The run's `metrics`: what a config or a caller names, as torchmetrics' objects with the names of their columns."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trainer.components.answers import AnswerKind
from trainer.components.base_task import Task
from trainer.components.classification import CrossEntropy
from trainer.components.directions import Direction
from trainer.components.element_losses import ElementLoss
from trainer.config.component_lists import MetricConfig
from trainer.config.registry import build, refuse_other_class, resolve
from trainer.errors import ConfigError, nearest

# Of torchmetrics' class names: the same metric for another kind of answer.
PREFIXES = ("Binary", "Multiclass", "Multilabel")
# What every metric of torchmetrics takes besides its own arguments.
COMMON_ARGUMENTS = (
    "compute_on_cpu",
    "compute_with_cache",
    "dist_sync_fn",
    "dist_sync_on_step",
    "distributed_available_fn",
    "process_group",
    "sync_on_compute",
)

Metrics = Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class NamedMetric:
    """A metric (a `torchmetrics.Metric`, or one of Lockstep's own), and the name under which its values are logged.

    `key` is what a message calls it: `metrics[0]`.
    """

    key: str
    name: str
    metric: Any

    @property
    def direction(self) -> Direction | None:
        """Which of its values is better, as far as torchmetrics knows."""
        higher_is_better = getattr(self.metric, "higher_is_better", None)
        if higher_is_better is None:
            return None
        return "max" if higher_is_better else "min"

    def owns(self, column: str) -> bool:
        """True if `column`, without its phase, may be a value of this metric; only a result tells for certain."""
        return column == self.name or column.startswith(f"{self.name}_")


@dataclass(frozen=True)
class MetricFacts:
    """What a run knows of its answers, for metrics whose arguments do not say it.

    `ignore_index` only where targets have places (pixels, tokens): ignored samples are left out before.
    """

    kind: AnswerKind | None
    num_classes: int | None
    num_labels: int | None
    ignore_index: int | None

    def arguments(self) -> dict[str, Any]:
        """By the names that torchmetrics' constructors have; what is unknown is left out."""
        values: dict[str, Any] = {"num_classes": self.num_classes}
        if self.kind == "labels":
            values["num_labels"] = self.num_labels
            is_one = self.num_labels in (None, 1)
            values["task"] = "binary" if is_one else "multilabel"
        if self.kind in ("class", "class_map"):
            values["task"] = "multiclass"
        if self.kind == "class_map":
            values["input_format"] = "index"
        values["ignore_index"] = self.ignore_index
        return {name: value for name, value in values.items() if value is not None}


def facts_for_metrics(task: Task, targets: Any, num_classes: int | None) -> MetricFacts:
    """What the task and a batch of `targets` tell."""
    kind = _kind_of(task, targets)
    num_labels = None
    if kind == "labels" and isinstance(targets, Tensor):
        num_labels = targets.shape[1] if targets.dim() > 1 else 1
    ignore_index = task.ignore_index if _have_places(targets) else None
    return MetricFacts(kind, num_classes, num_labels, ignore_index)


def _have_places(targets: Any) -> bool:
    """True for class ids of several places a sample, such as pixels."""
    if not isinstance(targets, Tensor) or targets.dim() < 2:
        return False
    return targets.dim() > 2 or (
        targets.shape[1] > 1 and not targets.is_floating_point()
    )


def _kind_of(task: Task, targets: Any) -> AnswerKind | None:
    if isinstance(task, ElementLoss):
        return task.answer_kind
    if isinstance(task, CrossEntropy) and isinstance(targets, Tensor):
        return "class_map" if targets.dim() > 2 else "class"
    return None


def build_metrics(
    sections: Sequence[MetricConfig], facts: MetricFacts
) -> list[NamedMetric]:
    """Import and build the metrics of a config, in order.

    Raises `ConfigError` naming the metric by its index, as in `metrics[0].name`.
    """
    named: list[NamedMetric] = []
    for index, section in enumerate(sections):
        key = f"metrics[{index}]"
        metric = _build_metric(key, section, facts.arguments())
        named += _flatten(key, section.log_as, metric)
    return named


def _build_metric(key: str, section: MetricConfig, supplied: Mapping[str, Any]) -> Any:
    from torchmetrics import Metric

    target = resolve(key, section.name, {})
    refuse_other_class(key, section.name, target, Metric)
    parameters = _parameters_of(target)
    _refuse_unknown_arguments(key, target, parameters, section.args)
    optional = {name: value for name, value in supplied.items() if name in parameters}
    return build(key, target, section.args, **optional)


def _parameters_of(target: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(target).parameters
    except (TypeError, ValueError):
        return {}


def _refuse_unknown_arguments(
    key: str,
    target: Any,
    parameters: Mapping[str, inspect.Parameter],
    arguments: Mapping[str, Any],
) -> None:
    """Raise `ConfigError` for an argument that a metric of torchmetrics does not take, and name the nearest.

    They all take any keyword, and pass it on to `Metric`, which refuses the unknown ones without saying what is known.
    """
    if not _is_of_torchmetrics(target):
        return
    for name in arguments:
        if name not in parameters and name not in COMMON_ARGUMENTS:
            choices = [choice for choice in parameters if choice != "kwargs"]
            raise ConfigError(
                f"{key}.{name}",
                f"{target.__name__} has no such argument{nearest(name, choices)}; it takes {', '.join(choices)}",
            )


def _is_of_torchmetrics(target: Any) -> bool:
    module = getattr(target, "__module__", None) or ""
    return isinstance(target, type) and module.startswith("torchmetrics.")


def name_metrics(metrics: Metrics) -> list[NamedMetric]:
    """Metrics that were passed as objects: a list, or a mapping from the name of the column to the metric."""
    from torchmetrics import Metric, MetricCollection

    named: list[NamedMetric] = []
    if isinstance(metrics, Metric | MetricCollection):
        metrics = [metrics]
    if isinstance(metrics, Mapping):
        for name, metric in metrics.items():
            named += _flatten(f'metrics["{name}"]', str(name), metric)
        return named
    if not isinstance(metrics, list | tuple):
        raise ConfigError(
            "metrics",
            f"is a list of torchmetrics.Metric, or a mapping of names to them, not a {type(metrics).__name__}",
        )
    for index, metric in enumerate(metrics):
        named += _flatten(f"metrics[{index}]", None, metric)
    return named


def _flatten(key: str, name: str | None, metric: Any) -> Iterator[NamedMetric]:
    """The metric with its name; of a `MetricCollection`, each of its metrics."""
    from torchmetrics import Metric, MetricCollection

    if isinstance(metric, MetricCollection):
        for own_name, part in metric.items():
            # A collection names each after its class, unless it was given names.
            is_named = own_name != type(part).__name__
            own = own_name if is_named else column_name(type(part))
            yield NamedMetric(key, own if name is None else f"{name}_{own}", part)
        return
    if not isinstance(metric, Metric):
        is_class = isinstance(metric, type)
        kind = f"the class {metric.__name__}" if is_class else type(metric).__name__
        raise ConfigError(
            key, f"{kind} is no torchmetrics.Metric; give an object of one"
        )
    yield NamedMetric(key, name or column_name(type(metric)), metric)


def column_name(cls: type) -> str:
    """The class in small letters, without what kind of answer it is for: `f1_score` for MulticlassF1Score."""
    name = cls.__name__
    if _is_of_torchmetrics(cls):
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
    name = name.replace("IoU", "Iou")
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    return words.lower()


def check_names(named: Sequence[NamedMetric], task: Task) -> None:
    """Raise `ConfigError` where two metrics have one name."""
    taken = dict.fromkeys(("loss", *task.metrics), "the loss's own")
    for item in named:
        if item.name in taken:
            raise ConfigError(
                item.key,
                f"val/{item.name} would be logged twice: {taken[item.name]} has that name, too; set log_as to another "
                f"(in Python, pass a mapping of names to metrics)",
            )
        taken[item.name] = item.key


def column_of(metric: str) -> str:
    """A logged `metric` without its phase: `f1_score` for `val/f1_score`; empty for one of training."""
    return "" if "train/" in metric else metric.rpartition("/")[2]


def direction_among(named: Sequence[NamedMetric], metric: str) -> Direction | None:
    """The direction of a logged `metric`, such as `val/f1_score`, if it is one of `named` and torchmetrics knows it."""
    column = column_of(metric)
    owners = [item for item in named if item.owns(column)]
    # Of `f1` and `f1_macro`, the longer name is meant by `f1_macro`.
    owners.sort(key=lambda item: len(item.name))
    return owners[-1].direction if owners else None
