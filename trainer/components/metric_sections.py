"""Metrics that were passed as objects, as sections of a config: `config.yaml` says what ran, and commands find it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.components.constructor_arguments import constructor_arguments
from trainer.components.metrics import NamedMetric
from trainer.config.component_lists import MetricConfig
from trainer.config.fields import PLAIN_TYPES


def without_names(
    sections: Sequence[MetricConfig], passed: Sequence[NamedMetric]
) -> list[MetricConfig]:
    """A config's sections but for those whose names metrics have that were `passed`: these replace them."""
    names = {item.name for item in passed}
    return [section for section in sections if section.log_as not in names]


def section_of(named: NamedMetric) -> MetricConfig | None:
    """The section that builds a metric like this one; None where its arguments cannot be read off it.

    Another metric in its place would be worse than none.
    """
    cls = type(named.metric)
    name = f"{cls.__module__}.{cls.__qualname__}"
    if "<" in name or cls.__module__ == "__main__":
        return None  # no import finds it
    try:
        section = MetricConfig(
            name=name, log_as=named.name, args=constructor_arguments(named.metric)
        )
        again = cls(**section.args)
    except Exception:
        # Anything: the class is other people's code, and need not take what it keeps.
        return None
    return section if _are_alike(named.metric, again) else None


def _are_alike(one: Any, other: Any) -> bool:
    """True if two metrics of a class have the same plain attributes, states and buffers."""
    mine, theirs = _facts_of(one), _facts_of(other)
    if mine.keys() != theirs.keys():
        return False
    for name, value in mine.items():
        if isinstance(value, Tensor):
            if not isinstance(theirs[name], Tensor) or not torch.equal(
                value, theirs[name]
            ):
                return False
        elif value != theirs[name]:
            return False
    return True


def _facts_of(metric: Any) -> dict[str, Any]:
    facts = {f"default {name}": value for name, value in metric._defaults.items()}
    for name, value in [*metric.named_buffers(), *vars(metric).items()]:
        is_hidden = name.startswith("_") or name in metric._defaults
        if not is_hidden and isinstance(value, (*PLAIN_TYPES, list, tuple, Tensor)):
            facts[name] = value
    # A metric within would be compared by what it says of itself.
    facts["parts"] = [repr(part) for part in metric.children()]
    return facts
