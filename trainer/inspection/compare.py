"""Two runs beside each other: config, data, environment, and the first logged step at which they part."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.core.metrics import TIMINGS
from trainer.errors import LockstepError
from trainer.reporting.jsonl import read_rows
from trainer.storage.run_directory import changed_keys, is_free, read_config

Pair = tuple[Any, Any]


@dataclass
class Comparison:
    """What differs, by name, with both values. `parted` is a column's first step that differs, `gaps` its largest
    difference over all steps that both runs logged, relative to the larger value."""

    config: dict[str, Pair] = field(default_factory=dict)
    free: dict[str, Pair] = field(default_factory=dict)
    data: dict[str, Pair] = field(default_factory=dict)
    environment: dict[str, Pair] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)
    only: tuple[int, int] = (0, 0)
    parted: dict[str, tuple[int, Any, Any]] = field(default_factory=dict)
    gaps: dict[str, float] = field(default_factory=dict)

    @property
    def same(self) -> bool:
        """Whether every value that both logged is the same, and there are some."""
        return bool(self.steps) and not self.parted


def compare(first: Path, second: Path) -> Comparison:
    """Compare two run directories; checkpoints are not needed.

    Raises `ConfigError` or `LockstepError` where one of them is no run, or lacks a file.
    """
    found = Comparison()
    for name, pair in changed_keys(read_config(first).to_dict(), read_config(second).to_dict()).items():
        (found.free if is_free(name) else found.config)[name] = pair
    environments = [_json(run / "environment.json") for run in (first, second)]
    found.data = changed_keys(*(each.pop("data") for each in environments))
    found.environment = changed_keys(*environments)
    _compare_rows(found, *(_columns(run / "metrics.jsonl") for run in (first, second)))
    return found


def _compare_rows(found: Comparison, ours: Mapping[str, dict[int, Any]], theirs: Mapping[str, dict[int, Any]]) -> None:
    """Column by column, since an epoch's rows and those of its steps stand beside each other."""
    shared: set[int] = set()
    every: tuple[set[int], set[int]] = ({s for c in ours.values() for s in c}, {s for c in theirs.values() for s in c})
    for name in ours.keys() & theirs.keys() - set(TIMINGS):
        for step in sorted(ours[name].keys() & theirs[name].keys()):
            shared.add(step)
            pair = ours[name][step], theirs[name][step]
            if repr(pair[0]) != repr(pair[1]):  # NaN is what it is
                found.parted.setdefault(name, (step, *pair))
                found.gaps[name] = max(found.gaps.get(name, 0.0), _relative(*pair))
    found.steps = sorted(shared)
    found.only = len(every[0] - shared), len(every[1] - shared)


def _columns(path: Path) -> dict[str, dict[int, Any]]:
    """Of `metrics.jsonl`, each column's values by step."""
    if not path.is_file():
        raise LockstepError(f"{path} is missing: the run has logged nothing")
    columns: dict[str, dict[int, Any]] = {}
    for row in read_rows(path):
        step = int(row.pop("step"))
        for name, value in row.items():
            columns.setdefault(name, {})[step] = value
    return columns


def _relative(a: Any, b: Any) -> float:
    if isinstance(a, str) or isinstance(b, str):
        return 0.0
    return float(abs(a - b) / (max(abs(a), abs(b)) or 1.0))


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise LockstepError(f"{path} cannot be read ({error}); it is written when a run begins") from None
