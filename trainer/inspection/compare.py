"""Two runs side by side: config, data, environment, and the first logged step at which they differ."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.core.metrics import TIMINGS
from trainer.errors import LockstepError
from trainer.reporting.jsonl import read_rows
from trainer.storage.run_directory import Change, changed_keys, is_free, read_config

Changes = dict[str, Change]  # by dotted key
Columns = dict[str, dict[int, Any]]  # of metrics.jsonl: each column's values by step


@dataclass
class Comparison:
    """What differs between two runs, by name, with both values.

    Attributes:

    - `config`, `free`: keys that change a run, and keys that a resumed run may change too.
    - `data`, `environment`: entries of `environment.json`.
    - `steps`: the steps that both runs logged; `only` counts those that one run alone logged.
    - `parted`: of each column that differs, the first such step and its values.
    - `gaps`: the column's largest difference over all steps, relative to the larger value.
    """

    config: Changes = field(default_factory=dict)
    free: Changes = field(default_factory=dict)
    data: Changes = field(default_factory=dict)
    environment: Changes = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)
    only: tuple[int, int] = (0, 0)
    parted: dict[str, tuple[int, Any, Any]] = field(default_factory=dict)
    gaps: dict[str, float] = field(default_factory=dict)

    @property
    def same(self) -> bool:
        """True if both runs logged some step, and every value that both logged is the same."""
        return bool(self.steps) and not self.parted


def compare(first: Path, second: Path) -> Comparison:
    """Compare two run directories; checkpoints are not needed.

    Raises `ConfigError` or `LockstepError` if one of them is no run or lacks a file.
    """
    comparison = Comparison()
    _compare_configs(comparison, first, second)
    _compare_environments(comparison, first, second)
    _compare_rows(comparison, _read_columns(first), _read_columns(second))
    return comparison


def _compare_configs(comparison: Comparison, first: Path, second: Path) -> None:
    changes = changed_keys(read_config(first).to_dict(), read_config(second).to_dict())
    for name, change in changes.items():
        changes_of_kind = comparison.free if is_free(name) else comparison.config
        changes_of_kind[name] = change


def _compare_environments(comparison: Comparison, first: Path, second: Path) -> None:
    ours = _read_environment(first)
    theirs = _read_environment(second)
    comparison.data = changed_keys(ours.pop("data"), theirs.pop("data"))
    comparison.environment = changed_keys(ours, theirs)


def _compare_rows(comparison: Comparison, ours: Columns, theirs: Columns) -> None:
    """Compare column by column, since an epoch's row and the row of its last step have the same step."""
    shared_steps: set[int] = set()
    for name in ours.keys() & theirs.keys() - set(TIMINGS):
        steps = ours[name].keys() & theirs[name].keys()
        shared_steps |= steps
        for step in sorted(steps):
            a, b = ours[name][step], theirs[name][step]
            if repr(a) == repr(b):  # as text, since NaN does not equal itself
                continue
            comparison.parted.setdefault(name, (step, a, b))
            comparison.gaps[name] = max(comparison.gaps.get(name, 0.0), _relative_difference(a, b))
    comparison.steps = sorted(shared_steps)
    comparison.only = (len(_steps(ours) - shared_steps), len(_steps(theirs) - shared_steps))


def _steps(columns: Columns) -> set[int]:
    return set().union(*columns.values())


def _read_columns(run: Path) -> Columns:
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise LockstepError(f"{path} is missing: the run has logged nothing")
    columns: Columns = {}
    for row in read_rows(path):
        step = int(row.pop("step"))
        for name, value in row.items():
            columns.setdefault(name, {})[step] = value
    return columns


def _read_environment(run: Path) -> dict[str, Any]:
    path = run / "environment.json"
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise LockstepError(f"{path} cannot be read ({error}); it is written when a run begins") from None


def _relative_difference(a: Any, b: Any) -> float:
    """|a - b| relative to the larger of both; 0 for text, which has no distance."""
    if isinstance(a, str) or isinstance(b, str):
        return 0.0
    largest = max(abs(a), abs(b))
    return float(abs(a - b) / largest) if largest else 0.0
