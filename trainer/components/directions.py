"""Whether less or more of a metric is better: what a task says of its own metrics, else what a known name means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from trainer.errors import ConfigError

Direction = Literal["min", "max"]

# By the last word of a name: `top5_accuracy` and `mean_iou` are among them.
LESS_IS_BETTER = {"loss", "mae", "mse", "rmse", "error", "perplexity"}
MORE_IS_BETTER = {
    *("accuracy", "precision", "recall", "f1", "iou", "dice"),
    *("auc", "auroc", "psnr", "ssim"),
}
PHASES = (
    *("val/", "val_ema/", "train/epoch_", "train/"),
    *("best/val/", "best/val_ema/", "best/train/"),
)


def direction_of(metric: str, task: object = None) -> Direction | None:
    """The direction of a logged `metric`, such as `val/accuracy`; None where nobody knows it.

    A task's `directions` come first, under the metric's name without its phase. Raises `ConfigError` if they hold
    anything but "min" and "max".
    """
    name = _without_phase(metric)
    directions: Any = getattr(task, "directions", None) or {}
    if isinstance(directions, Mapping) and name in directions:
        return _checked(name, directions[name])
    # The name of a validation set stands before that of the metric.
    _, _, name = name.rpartition("/")
    if isinstance(directions, Mapping) and name in directions:
        return _checked(name, directions[name])
    _, _, last_word = name.lower().rpartition("_")
    if last_word in LESS_IS_BETTER:
        return "min"
    if last_word in MORE_IS_BETTER:
        return "max"
    return None


def _without_phase(metric: str) -> str:
    for phase in sorted(PHASES, key=len, reverse=True):
        if metric.startswith(phase):
            return metric.removeprefix(phase)
    return metric


def _checked(name: str, direction: Any) -> Direction:
    if direction == "min":
        return "min"
    if direction == "max":
        return "max"
    raise ConfigError(
        "loss.name",
        f'the task\'s directions["{name}"] is {direction!r}; it is "min" or "max"',
    )
