"""Early stopping (`early_stop`): the run ends when a logged value has not got better for some evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from trainer.config.run_sections import EarlyStopConfig
from trainer.config.schema import Config
from trainer.core.logged_metrics import LoggedMetrics, epoch_column
from trainer.core.metrics import Row
from trainer.core.saved_state import is_best


class EarlyStop:
    """Counts evaluations without a better value. Rows are the same on every rank, and so is what it decides.

    `section` is resolved, as `with_early_stop_metric` does. Its state is part of every checkpoint.
    """

    def __init__(self, section: EarlyStopConfig) -> None:
        self._section = section
        self._column = epoch_column(str(section.metric))
        self._best: float | None = None
        self._waited = 0

    def update(self, row: Row) -> str:
        """Take note of a row; returns why the run is to end, "" if it goes on."""
        section = self._section
        value = row.get(self._column)
        patience = section.patience
        if value is None or patience is None:
            return ""
        if is_best(value, self._best, section.mode, section.min_delta):
            self._best = value
            self._waited = 0
            return ""
        self._waited += 1
        if self._waited < patience:
            return ""
        best = "no finite value" if self._best is None else f"{self._best:.6g}"
        return (
            f"early_stop: {section.metric} has not got better than {best} in {self._waited} "
            f"evaluation{'s' if self._waited > 1 else ''}"
        )

    def wait_anew(self) -> None:
        """The run goes on after its end: it gets `patience` more evaluations."""
        self._waited = 0

    def state_dict(self) -> dict[str, Any]:
        watched = {"metric": self._section.metric, "mode": self._section.mode}
        return {**watched, "best": self._best, "waited": self._waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned; a run that watches another metric by now begins to count anew."""
        section = self._section
        if (state["metric"], state["mode"]) == (section.metric, section.mode):
            self._best = state["best"]
            self._waited = state["waited"]


def with_early_stop_metric(config: Config, logged: LoggedMetrics) -> Config:
    """The config with the metric that early stopping watches, and its mode; as it is without `patience`.

    Raises `ConfigError` where the run logs no such metric, or nobody knows whether less or more of it is better.
    """
    section = config.early_stop
    if section.patience is None:
        return config
    metric = section.metric or config.best.metric
    logged.check("early_stop.metric", metric)
    mode = section.mode
    if mode is None and metric == config.best.metric:
        mode = config.best.mode
    if mode is None:
        mode = logged.direction("early_stop.mode", metric)
    return replace(config, early_stop=replace(section, metric=metric, mode=mode))


def describe_early_stop(section: EarlyStopConfig) -> str:
    """One line for the header of a run; "" without early stopping."""
    if section.patience is None:
        return ""
    better = "higher" if section.mode == "max" else "lower"
    by = f" by more than {section.min_delta:g}" if section.min_delta else ""
    several = "s in a row" if section.patience > 1 else ""
    return f"after {section.patience} evaluation{several} without a {better} {section.metric}{by}"
