"""What a run's model is evaluated on, and how."""

from __future__ import annotations

from functools import partial

from torch import nn

from trainer.components.freezing import Freezing
from trainer.components.task import Task, has_plain_predict
from trainer.config.schema import Config
from trainer.core.build_loaders import Loaders
from trainer.core.build_model import is_sharded
from trainer.core.evaluation import EvaluationSet, Evaluator
from trainer.core.evaluation_metrics import EvaluationMetrics
from trainer.core.features import Features
from trainer.core.forward import Forward
from trainer.data.bad_samples import Quarantine
from trainer.data.datasets import Datasets
from trainer.process.ranks import Ranks


def run_evaluation_sets(
    config: Config,
    ranks: Ranks,
    data: Datasets,
    loaders: Loaders,
    *,
    module: nn.Module,
    forward: Forward,
    freezing: Freezing,
    quarantine: Quarantine | None,
    metrics: EvaluationMetrics,
) -> dict[str, EvaluationSet]:
    """The validation sets and the test set, by phase, each with its evaluator."""
    head = partial(_head_of_fixed_features, config, forward.task, freezing)
    sets = {}
    for phase, dataset in data.evaluated().items():
        loader = loaders.evaluated[phase]
        evaluator = Evaluator(
            module,
            forward,
            loader,
            ranks,
            samples=len(dataset),
            batch_size=config.batch.eval_size,
            exact=config.run.reproducibility == "bitwise",
            features=Features(head),
            quarantine=quarantine,
            metrics=metrics,
            is_sharded=is_sharded(config, ranks),
        )
        sets[phase] = EvaluationSet(phase, dataset, loader, evaluator)
    return sets


def _head_of_fixed_features(
    config: Config, task: Task, freezing: Freezing
) -> nn.Module | None:
    """The head, if running it on cached features gives what running the model gives; else None."""
    # Parts of a model that is shared out are gathered by a forward of the whole.
    runs_whole = config.train.compile or config.train.parallel == "fsdp"
    return freezing.head if has_plain_predict(task) and not runs_whole else None
