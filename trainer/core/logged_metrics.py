"""Which metrics a run logs, and of which less or more is better: what `best` and `early_stop` may watch."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.components.directions import Direction, direction_of
from trainer.components.metrics import NamedMetric, column_of, direction_among
from trainer.components.task import Task
from trainer.errors import ConfigError, nearest


def epoch_column(metric: str) -> str:
    """The column in which an epoch's row has a metric: that of training is a mean there, with a name of its own."""
    return metric.replace("train/", "train/epoch_")


class LoggedMetrics:
    """The loss and the metrics of `task`, and those of the config, by the names that rows have for them.

    `evaluated` are the first parts of the names in evaluations: `val`, `val/<set>`, `val_ema`.
    """

    def __init__(
        self, task: Task, named: Sequence[NamedMetric], evaluated: Sequence[str]
    ) -> None:
        self._task = task
        self._named = named
        self._evaluated = evaluated
        self.names: list[str] = []
        for phase in [*evaluated, "train"]:
            if phase == "train" or task.validates_loss:
                self.names.append(f"{phase}/loss")
            self.names += [f"{phase}/{name}" for name in task.metrics]
        # The loss of the first validation set if there is any, or the first metric where an evaluation has no loss.
        self.default = self.names[0]
        for phase in evaluated:
            self.names += [f"{phase}/{item.name}" for item in named]

    def check(self, key: str, metric: str) -> None:
        """Raise `ConfigError` at `key` where the run logs no such metric."""
        if self.may_have(metric):
            return
        raise ConfigError(
            key,
            f'"{metric}" is not logged by this run{nearest(metric, self.names)}; it logs {", ".join(self.names)}',
        )

    def may_have(self, metric: str) -> bool:
        """False if the run logs no such metric. Of several values of a metric, only its result tells which it gives."""
        if metric in self.names:
            return True
        column = column_of(metric)
        is_evaluated = metric.removesuffix(f"/{column}") in self._evaluated
        return is_evaluated and any(item.owns(column) for item in self._named)

    def direction(self, key: str, metric: str) -> Direction:
        """Whether less or more of `metric` is better. Raises `ConfigError` at `key` where nobody knows."""
        mode = direction_among(self._named, metric) or direction_of(metric, self._task)
        if mode is None:
            raise ConfigError(
                key,
                f"is needed for {metric}: set min if less of it is better, max if more is (a task of your own may "
                f"say so in `directions`)",
            )
        return mode
