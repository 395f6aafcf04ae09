"""A step of a run done over on one process, and taken apart: where a run went wrong, and on which samples.

The step is reached from the nearest checkpoint before it, or from the run's first step, by training as the run did.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.errors import ConfigError
from trainer.exact.plan import Step
from trainer.inspection.watch import Watch
from trainer.reporting.jsonl import read_rows
from trainer.storage import checkpoint
from trainer.trainer import Trainer

Rows = dict[int, dict[str, Any]]  # logged rows of steps, by step


@dataclass
class Replay:
    """What is known of the step. `asked` is another where a step before it had no finite loss already."""

    step: int
    asked: int
    epoch: int
    learning_rate: float
    began_after: int  # the step of the checkpoint, 0 for the run's beginning
    loss: float  # the step's: what a log interval of one step would show
    grad_norm: float  # before clipping
    samples: list[dict[str, Any]]  # id, file, target, micro_batch, loss
    layers: dict[str, dict[str, float]]  # outputs' least and largest finite value, and the share that is finite
    batch_norm: dict[str, dict[str, float]]  # least and largest mean and variance, of a channel in a micro-batch
    weights: dict[str, dict[str, float]]  # norm, gradient's norm, norm of the change
    digests: dict[int, tuple[str, str]]  # at logged steps on the way: the run's, and this one's
    logged: dict[str, tuple[float, float]] = field(default_factory=dict)  # the row at this step: the run's, this one's
    images: Tensor | None = field(default=None, repr=False)  # (N, C, H, W) in [0, 1], as the model saw them


def replay(make_trainer: Callable[[], Trainer], run: Path, number: int) -> Replay:
    """Take step `number` (1 is the first) of `run` apart; `make_trainer` builds what the run's config describes.

    If the loss is not finite in a step on the way, that step is taken apart instead. Raises `ConfigError` where
    the run has no such step.
    """
    trainer = make_trainer()
    if trainer.ranks.count > 1:
        raise ConfigError("RUN", "replay is for one process; start it without a launcher")
    if not 1 <= number <= trainer.plan.total_steps:
        raise ConfigError("--step", f"{number} is none of the run's steps, 1 to {trainer.plan.total_steps}")
    logged = _logged(run)
    digests: dict[int, tuple[str, str]] = {}
    began = _restore(trainer, run, before=number)
    bad = _advance(trainer, number, logged, digests)
    if bad is not None:
        trainer, digests = make_trainer(), {}
        _restore(trainer, run, before=number)
        _advance(trainer, bad, logged, digests)
    found = _examine(trainer, logged, digests)
    found.asked, found.began_after = number, began
    return found


def _logged(run: Path) -> Rows:
    rows = read_rows(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else []
    return {int(row["step"]): row for row in rows if "train/loss" in row}


def _restore(trainer: Trainer, run: Path, *, before: int) -> int:
    """Bring `trainer` to the newest checkpoint before the step, if there is one; the step it is of."""
    names = [f"step_{step:08d}" for step in range(before)]
    kept = {path.name: path for path in (run / "checkpoints").glob("step_*")}
    found = max(kept.keys() & set(names), default=None)
    if found is not None:
        trainer.restore(checkpoint.load(kept[found]))
    trainer.start()
    return trainer.progress.step


def _advance(trainer: Trainer, to: int, logged: Rows, digests: dict[int, tuple[str, str]]) -> int | None:
    """Train up to the step before `to`; returns the first step on the way whose loss is not finite."""
    for step in trainer.plan.steps(trainer.progress.step):
        if step.number == to:
            return None
        with Watch(trainer, detailed=False) as watch:
            trainer.train_step(step)
        if not watch.is_finite():
            return step.number
        _check(trainer, step, logged, digests)
    return None


def _check(trainer: Trainer, step: Step, logged: Rows, digests: dict[int, tuple[str, str]]) -> dict[str, float]:
    """At a logged step, the row and digest as the run would log them now; what it measured goes on as in the run."""
    row = logged.get(step.number)
    if row is None:
        return {}
    digests[step.number] = str(row.get("digest")), trainer.digest()
    metric = trainer.config.best.metric.replace("train/", "train/epoch_")
    trainer.progress.history += [row[metric]] if metric in row else []  # what a plateau schedule goes by
    return trainer.measure(step)


def _examine(trainer: Trainer, logged: Rows, digests: dict[int, tuple[str, str]]) -> Replay:
    step = trainer.plan.step(trainer.progress.step)
    with Watch(trainer, detailed=True) as watch:
        trainer.train_step(step)
    row = _check(trainer, step, logged, digests)
    kept = logged.get(step.number, {})
    return Replay(
        step=step.number,
        asked=step.number,
        epoch=step.epoch + 1,
        learning_rate=trainer.optimizer.param_groups[0]["lr"],
        began_after=0,
        loss=watch.loss(),
        grad_norm=watch.grad_norm(),
        samples=watch.samples(step),
        layers=watch.layers,
        batch_norm=watch.batch_norm,
        weights=watch.weights(),
        digests=digests,
        logged={name: (kept[name], value) for name, value in row.items() if name in ("train/loss", "grad_norm", "lr")},
        images=watch.images(),
    )
