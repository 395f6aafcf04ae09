"""What a checkpoint and `best/` hold of a run, and how the run takes it over again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from trainer.components.optimizer import load_named_state, named_state
from trainer.components.optimizer_modes import evaluation_weights
from trainer.config.secrets import holds_secret
from trainer.core.further import of_best, read_further, restore_evaluated
from trainer.core.metrics import Row
from trainer.core.not_finite import refuse_not_finite
from trainer.core.run import Run
from trainer.exact.model_and_loss import ModelAndLoss
from trainer.exact.reduction import Reduction
from trainer.storage import best_model, checkpoint
from trainer.storage.checkpoint import (
    FURTHER,
    MODEL_FILE,
    OPTIMIZER_FILE,
    Checkpoint,
    Progress,
)
from trainer.storage.run_directory import config_yaml
from trainer.storage.snapshot import Snapshot
from trainer.storage.whole_tensors import collect


class SavedState:
    """Reads the state of a run's model, loss and optimizer for its files, and puts it back."""

    def __init__(self, run: Run, optimizer: Optimizer, reduction: Reduction) -> None:
        self._run = run
        self._optimizer = optimizer
        self._reduction = reduction
        self._whole = ModelAndLoss(run.module, run.task)
        # With shards, on the main process, from `collect` until they are written.
        self._weights: dict[str, Tensor] = {}
        self._optimizer_tensors: dict[str, Tensor] = {}

    def collect(self, step: int) -> None:
        """Bring what `take` is to hold to the main process, where ranks hold parts of it. A collective.

        Raises `LockstepError` where the weights or the optimizer's state are not finite.
        """
        tensors, _ = named_state(self._optimizer, self._whole)
        ranks = self._run.ranks
        ranks.on_each(lambda: refuse_not_finite(self._whole, tensors, step))
        self._weights = collect(checkpoint.model_tensors(self._run.module), ranks)
        self._optimizer_tensors = collect(tensors, ranks)

    def collect_best(self) -> None:
        """The same for `with_best`."""
        if self._run.is_sharded:
            with evaluation_weights(self._optimizer):
                tensors = checkpoint.model_tensors(self._run.module)
                self._weights = collect(tensors, self._run.ranks)

    def _take_weights(self) -> dict[str, Tensor]:
        """The whole weights; the run's own tensors, unless they were collected."""
        if not self._run.is_sharded:
            return checkpoint.model_tensors(self._run.module)
        # Given away, so that they are freed once they are written.
        weights, self._weights = self._weights, {}
        return weights

    def refuse_not_finite(self, step: int, known: Sequence[Tensor]) -> None:
        """Raise `LockstepError` where the weights or the optimizer's state are not finite.

        Those `known` to be are not looked at, nor those of shards, which `collect` has looked at.
        """
        if not self._run.is_sharded:
            tensors, _ = named_state(self._optimizer, self._whole)
            refuse_not_finite(self._whole, tensors, step, known)

    def take(self, progress: Progress, states: dict[str, dict[str, Any]]) -> Snapshot:
        """What a checkpoint holds now; `states` are those of stateful objects. `refuse_not_finite` is to follow."""
        tensors, numbers = named_state(self._optimizer, self._whole)
        if self._run.is_sharded:
            # Whole ones, and given away like the weights.
            tensors, self._optimizer_tensors = self._optimizer_tensors, {}
        further = self._further()
        if further:
            states = states | {FURTHER: further}
        content = Checkpoint(
            self._take_weights(),
            tensors,
            numbers,
            progress,
            self._run.config.to_dict(digests=True),
            stateful=states,
        )
        return self._with_collected(checkpoint.take(content))

    def with_best(self, row: Row, write: Callable[[Snapshot], None]) -> None:
        """Call `write` with the model as the best one, and the `row` of its evaluation.

        Only during the call does the model hold the weights that are evaluated, where its optimizer has others.
        """
        with evaluation_weights(self._optimizer):
            snapshot = best_model.take(
                self._take_weights(),
                self._config_yaml,
                row,
                self._run.signature.to_dict(),
                private=self._config_is_private,
                further=of_best(self._further()),
            )
            write(self._with_collected(snapshot))

    # A run's config stays as it is, and to write it as YAML takes longer than many small steps.
    @cached_property
    def _config_yaml(self) -> str:
        return config_yaml(self._run.config)

    @cached_property
    def _config_is_private(self) -> bool:
        return holds_secret(self._run.config.to_dict())

    def _with_collected(self, snapshot: Snapshot) -> Snapshot:
        """Mark the files whose tensors were collected: those are copies already."""
        if self._run.is_sharded:
            snapshot.copied |= {MODEL_FILE, OPTIMIZER_FILE}
        return snapshot

    def restore(self, content: Checkpoint) -> tuple[Mapping[str, Any], dict[str, Any]]:
        """Take over weights, loss and optimizer; returns what is left: further state, and that of stateful objects."""
        checkpoint.restore_model(self._run.module, content.model)
        states = dict(content.stateful)
        further = states.pop(FURTHER, {})
        restore_evaluated(further, self._run.module, self._run.loss_state)
        load_named_state(
            self._optimizer, self._whole, content.optimizer, content.optimizer_numbers
        )
        self._run.precision.load_state(content.progress.scaler)
        return further, states

    def _further(self) -> dict[str, Any]:
        return read_further(
            self._run.module, self._run.loss_state, self._reduction.moving_buffers
        )


def is_best(
    value: float, before: float | None, mode: str | None, min_delta: float = 0.0
) -> bool:
    """True if a metric's `value` is better than the best `before`, by more than `min_delta`.

    NaN and infinities never are.
    """
    if not math.isfinite(value):
        return False
    if before is None:
        return True
    gain = value - before if mode == "max" else before - value
    return gain > min_delta
