"""The keys of components that come in lists, since several can be at work in one run: observers, metrics, trackers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from trainer.config.fields import ComponentSection, key, read_section, show
from trainer.errors import ConfigError, nearest

# Of a metric, without its phase.
COLUMN_NAME = re.compile(r"[\w.@-]+")
OBSERVERS = ("save_predictions",)  # those that come with Lockstep


@dataclass(frozen=True, kw_only=True)
class ObserverConfig(ComponentSection):
    """One of `observers`."""

    SECTION = "observers"
    EXAMPLE: ClassVar[str] = "MyObserver"

    name: str = key("", "save_predictions, or an import path to an observer")

    def __post_init__(self) -> None:
        super().__post_init__()
        if "." not in self.name and self.name not in OBSERVERS:
            raise ConfigError(
                f"{self.SECTION}.name",
                f'"{self.name}" is not an import path, nor one of {", ".join(OBSERVERS)}'
                f"{nearest(self.name, OBSERVERS)}; write {{name: my_package.MyObserver, argument: value}}",
            )


@dataclass(frozen=True, kw_only=True)
class MetricConfig(ComponentSection):
    """One of `metrics`."""

    SECTION = "metrics"
    EXAMPLE: ClassVar[str] = "MyMetric"

    name: str = key("", "import path to a torchmetrics.Metric")
    log_as: str | None = key(
        None,
        "its column, val/<log_as>; null = its class in small letters: f1_score for MulticlassF1Score",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if "." not in self.name:
            raise ConfigError(
                f"{self.SECTION}.name",
                f'"{self.name}" is not an import path; write '
                f"{{name: torchmetrics.classification.MulticlassF1Score, average: macro}}",
            )
        if self.log_as is not None and not COLUMN_NAME.fullmatch(self.log_as):
            raise ConfigError(
                f"{self.SECTION}.log_as",
                f'"{self.log_as}" is no name of a column; use letters, digits and _ - . @',
            )


TRACKERS = ("tensorboard", "mlflow", "trackio", "csv")


@dataclass(frozen=True, kw_only=True)
class TrackerConfig(ComponentSection):
    """One of `trackers`."""

    SECTION = "trackers"
    EXAMPLE: ClassVar[str] = "MyTracker"

    name: str = key(
        "",
        "tensorboard, mlflow, trackio, csv, or an import path to a trainer.Tracker or a tracker of Accelerate's",
    )
    strict: bool = key(
        False, "stop the run with an error when the tracker fails, instead of a warning"
    )
    timeout: float = key(
        30.0,
        "how long to wait for the tracker at the start, at a checkpoint and at the end",
        unit="seconds",
        minimum=0.1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if "." not in self.name and self.name not in TRACKERS:
            raise ConfigError(
                f"{self.SECTION}.name",
                f'"{self.name}" is not one of {", ".join(TRACKERS)}, nor an import path{nearest(self.name, TRACKERS)}',
            )


LISTS: dict[str, Any] = {
    cls.SECTION: cls for cls in (MetricConfig, ObserverConfig, TrackerConfig)
}


def read_list(cls: Any, items: Any) -> tuple[Any, ...]:
    """The components of a list, each of the class `cls`."""
    if items is None:
        return ()
    if not isinstance(items, list | tuple):
        raise ConfigError(
            cls.SECTION,
            f"{show(items)} is not a list such as [{{name: my_package.{cls.EXAMPLE}}}]",
        )
    sections = []
    for index, item in enumerate(items):
        try:
            sections.append(read_section(cls, item))
        except ConfigError as error:
            # A section does not know its place in the list.
            place = error.key.replace(cls.SECTION, f"{cls.SECTION}[{index}]", 1)
            raise ConfigError(place, error.message) from None
    return tuple(sections)
