"""The metrics of a run that are computed over whole evaluations: its config's, those that were passed, and defaults."""

from __future__ import annotations

from dataclasses import replace

from trainer.components.metric_sections import section_of, without_names
from trainer.components.metrics import (
    Metrics,
    NamedMetric,
    build_metrics,
    check_names,
    facts_for_metrics,
    name_metrics,
)
from trainer.components.task import Task
from trainer.config.schema import Config
from trainer.core.mean_iou import default_metrics
from trainer.data.loading import Loader
from trainer.errors import ConfigError
from trainer.exact.seeding import key, preserved_cpu_generators, seed_cpu


def run_metrics(
    config: Config,
    metrics: Metrics,
    task: Task,
    loader: Loader | None,
    num_classes: int | None,
) -> tuple[Config, list[NamedMetric]]:
    """The metrics that are computed over whole evaluations: the config's, then those that were passed.

    The config that is returned has sections of those, too. Raises `ConfigError` for what cannot be measured.
    """
    if loader is None:
        if metrics:
            raise ConfigError(
                "metrics",
                "are computed over validation data, and there are none; give val_data",
            )
        return config, []
    targets = loader.peek([loader.first_id]).targets
    facts = facts_for_metrics(task, targets, num_classes)
    passed = name_metrics(metrics) if metrics else []
    sections = without_names(config.metrics, passed)
    # Should one draw, as a network within does, it draws the same on every rank.
    with preserved_cpu_generators():
        seed_cpu(key(config.run.seed, "metrics"))
        named = [*build_metrics(sections, facts), *passed]
        recorded = [section for item in passed if (section := section_of(item))]
    config = replace(config, metrics=(*sections, *recorded))
    named += default_metrics(named, task, facts)
    check_names(named, task)
    return config, named
