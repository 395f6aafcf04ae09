"""`Run`: what training, evaluation and inspection share. `trainer.core.build` builds it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trainer.components.freezing import Freezing
from trainer.components.task import (
    Task,
)
from trainer.config.schema import Config
from trainer.core.build_model import is_sharded
from trainer.core.evaluation import EvaluationSet, Evaluator, OnBatch
from trainer.core.evaluation_metrics import EvaluationMetrics
from trainer.core.forward import Forward
from trainer.core.further import LossState, restore_evaluated
from trainer.core.metrics import Row
from trainer.core.precision import Precision
from trainer.core.preflight import RankFacts
from trainer.data.bad_samples import Quarantine
from trainer.data.datasets import Datasets
from trainer.data.loading import Loader
from trainer.errors import ConfigError
from trainer.exact.determinism import run_settings
from trainer.exact.plan import Plan, Step
from trainer.exact.remaining import remaining_step
from trainer.process.ranks import Ranks
from trainer.process.working_directory import WorkingDirectory
from trainer.storage import best_model, checkpoint
from trainer.storage.run_directory import run_path
from trainer.storage.signature import (
    Signature,
)
from trainer.storage.whole_tensors import spread


@dataclass
class Run:
    """The parts of a run on this process, each built from its own section of the config.

    `module` is the model itself, without DDP, on its device and in the run's dtype. `weights_note` says in one line
    which weights it started from. `facts_of_ranks` has what each rank runs on, in rank order.
    """

    config: Config
    ranks: Ranks
    facts_of_ranks: list[RankFacts]
    precision: Precision
    data: Datasets
    plan: Plan
    train_loader: Loader
    signature: Signature
    module: nn.Module
    weights_note: str
    dtypes_note: str  # which tensors of the model had another dtype
    inputs_note: str  # what may be wrong with the first training input
    task: Task
    loss_state: LossState
    forward: Forward
    freezing: Freezing
    metrics: EvaluationMetrics
    validation: list[EvaluationSet]
    test: EvaluationSet | None
    working_directory: WorkingDirectory  # in which the config's paths begin
    device_note: str = ""  # what lies on the device, with data.on_device
    sharding_note: str = ""  # which parameters are in use outside the model, with fsdp
    quarantine: Quarantine | None = None  # with data.bad_samples=quarantine
    stop_reason: str = ""  # why the run is to end before its last step

    @property
    def evaluator(self) -> Evaluator | None:
        """That of the first validation set."""
        return self.validation[0].evaluator if self.validation else None

    @property
    def val_loader(self) -> Loader | None:
        """That of the first validation set."""
        return self.validation[0].loader if self.validation else None

    @property
    def evaluation_sets(self) -> list[EvaluationSet]:
        """The validation sets, then the test set."""
        return [*self.validation, *([] if self.test is None else [self.test])]

    @property
    def bitwise(self) -> bool:
        return self.config.run.reproducibility == "bitwise"

    @property
    def is_sharded(self) -> bool:
        """True if each process holds a part of the parameters: then a forward is a collective."""
        return is_sharded(self.config, self.ranks)

    def remaining(self, step: Step) -> Step:
        """A step of the plan without the samples that are known to be bad: as it was, or will be, trained."""
        if self.quarantine is None:
            return step
        bad = self.quarantine.ids("train", step.number)
        return remaining_step(self.plan, step, bad)

    @contextmanager
    def settings(self) -> Iterator[None]:
        """A context with the process-wide settings that the run needs; it restores those before at the end."""
        with self.working_directory.entered(), settings_of(self.config):
            yield

    def stop(self, reason: str) -> None:
        """Ask for the run's end: after the next logged row, with a checkpoint, an evaluation and a summary.

        Rank 0's request counts, whatever the other ranks ask for, so all of them end after the same step.
        """
        if not isinstance(reason, str) or not reason:
            raise ConfigError(
                "observers", f"run.stop({reason!r}): give the reason, as text"
            )
        self.stop_reason = self.stop_reason or reason

    def evaluate(self, watch: Callable[[str], OnBatch | None] | None = None) -> Row:
        """The loss and metrics over all validation samples. A collective.

        Of named sets, each under its name, as in `clean/loss`. `watch` gives, for a set's phase, what is called with
        the ids, the output and the targets of each of this rank's batches. Raises `ConfigError` where there are no
        validation samples.
        """
        if not self.validation:
            raise ConfigError("data.name", f"{self.data.name} has no validation data")
        row: Row = {}
        for item in self.validation:
            on_batch = None if watch is None else watch(item.phase)
            means = item.evaluator.evaluate(on_batch)
            row |= {f"{item.prefix}{name}": value for name, value in means.items()}
        return row

    def load_best(self, directory: Path | None = None) -> Row:
        """Load the best weights of the run in `directory` (this one's) on every rank; returns their row. A collective.

        Only the main process reads them: no other machine needs to see the run's directory.
        """
        row: Row
        tensors: dict[str, Tensor] = {}  # on the main process
        path = directory or self.working_directory.absolute(run_path(self.config.run))
        row, further = self.ranks.on_main(lambda: self._read_best(path, tensors))
        if self.is_sharded:
            spread(self.module, tensors, self.ranks)
        else:
            self.ranks.broadcast_parameters(self.module)
        restore_evaluated(further, self.module, self.loss_state)
        if directory is not None:
            self.forget_features()
        return row

    def _read_best(
        self, directory: Path, tensors: dict[str, Tensor]
    ) -> tuple[Row, dict[str, Any]]:
        """The best model's row and further state; its weights go into the module and into `tensors`."""
        weights, row = best_model.load(directory)
        checkpoint.restore_model(self.module, weights)
        tensors.update(weights)
        return row, best_model.load_further(directory)

    def forget_features(self) -> None:
        """Discard cached features: the weights have changed by something other than a training step."""
        for item in self.evaluation_sets:
            item.evaluator.forget()

    def end_evaluations(self) -> None:
        """End the loader processes of all evaluations; another evaluation starts them again."""
        for item in self.evaluation_sets:
            item.evaluator.close()


def settings_of(config: Config) -> AbstractContextManager[None]:
    """A context with the process-wide settings of a run with `config`; it restores those before at the end."""
    return run_settings(
        bitwise=config.run.reproducibility == "bitwise",
        compiled=bool(config.train.compile),
        tf32=config.train.tf32,
        cudnn_benchmark=config.train.cudnn_benchmark,
    )
