"""Two runs side by side: config, data, environment, and the first logged step at which they differ."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.secrets import redacted_value
from trainer.core.metrics import TIMINGS
from trainer.errors import LockstepError
from trainer.reporting.jsonl import read_rows
from trainer.storage.environment import ENVIRONMENT_FILE
from trainer.storage.run_directory import Change, changed_keys, is_free, read_config

Changes = dict[str, Change]  # by dotted key
Difference = tuple[int, Any, Any]  # a step and both values
Columns = dict[str, dict[int, Any]]  # of metrics.jsonl: each column's values by step


@dataclass(frozen=True)
class Comparison:
    """What differs between two runs, by name, with both values.

    Attributes:

    - `config`, `free`: keys that change a run, and keys that a resumed run may change too.
    - `data`, `environment`: entries of `environment.json`.
    - `steps`: the steps that both runs logged; `steps_of_one` counts those that the first or the second alone logged.
    - `first_differences`: for each column that differs, the first such step and its values.
    - `largest_differences`: for each such column, the largest over all steps, relative to the larger value.
    """

    config: Changes
    free: Changes
    data: Changes
    environment: Changes
    steps: list[int]
    steps_of_one: tuple[int, int]
    first_differences: dict[str, Difference]
    largest_differences: dict[str, float]

    @property
    def same(self) -> bool:
        """True if both runs logged some step, and every value that both logged is the same."""
        return bool(self.steps) and not self.first_differences


def compare(first: Path, second: Path) -> Comparison:
    """Compare two run directories; checkpoints are not needed.

    Raises `ConfigError` or `LockstepError` if one of them is no run or lacks a file.
    """
    config, free = _compare_configs(first, second)
    data, environment = _compare_environments(first, second)
    columns = _read_columns(first)
    other_columns = _read_columns(second)
    steps = _shared_steps(columns, other_columns)
    steps_of_first = _all_steps(columns) - steps
    steps_of_second = _all_steps(other_columns) - steps
    first_differences, largest_differences = _compare_columns(columns, other_columns)
    return Comparison(
        config=config,
        free=free,
        data=data,
        environment=environment,
        steps=sorted(steps),
        steps_of_one=(len(steps_of_first), len(steps_of_second)),
        first_differences=first_differences,
        largest_differences=largest_differences,
    )


def _compare_configs(first: Path, second: Path) -> tuple[Changes, Changes]:
    """The changed keys that change a run, and those that do not."""
    config: Changes = {}
    free: Changes = {}
    changes = changed_keys(read_config(first).to_dict(), read_config(second).to_dict())
    for name, change in changes.items():
        if is_free(name):
            free[name] = change
        else:
            first_value, second_value = change
            config[name] = (
                redacted_value(name, first_value),
                redacted_value(name, second_value),
            )
    return config, free


def _compare_environments(first: Path, second: Path) -> tuple[Changes, Changes]:
    """What differs in the data's fingerprints, and in everything else."""
    environment = _read_environment(first)
    other_environment = _read_environment(second)
    # Host names, clocks and disks differ without meaning anything.
    for values in (environment, other_environment):
        values.pop("ranks", None)
    data = changed_keys(environment.pop("data"), other_environment.pop("data"))
    return data, changed_keys(environment, other_environment)


def _compare_columns(
    columns: Columns, other_columns: Columns
) -> tuple[dict[str, Difference], dict[str, float]]:
    """The first difference and the largest one, of each column that differs.

    Column by column, since an epoch's row and the row of its last step have the same step.
    """
    first_differences: dict[str, Difference] = {}
    largest_differences: dict[str, float] = {}
    for name in _shared_columns(columns, other_columns):
        values, other_values = columns[name], other_columns[name]
        for step in sorted(values.keys() & other_values.keys()):
            value, other = values[step], other_values[step]
            if repr(value) == repr(other):  # as text, since NaN does not equal itself
                continue
            first_differences.setdefault(name, (step, value, other))
            difference = _relative_difference(value, other)
            largest = largest_differences.get(name, 0.0)
            largest_differences[name] = max(largest, difference)
    return first_differences, largest_differences


def _shared_steps(columns: Columns, other_columns: Columns) -> set[int]:
    steps: set[int] = set()
    for name in _shared_columns(columns, other_columns):
        steps |= columns[name].keys() & other_columns[name].keys()
    return steps


def _shared_columns(columns: Columns, other_columns: Columns) -> set[str]:
    """The columns that both runs logged, without timings, which no two runs share."""
    return columns.keys() & other_columns.keys() - set(TIMINGS)


def _all_steps(columns: Columns) -> set[int]:
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
    path = run / ENVIRONMENT_FILE
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise LockstepError(
            f"{path} cannot be read ({error}); it is written when a run begins"
        ) from None


def _relative_difference(value: Any, other: Any) -> float:
    """|value - other| relative to the larger of both; 0 for text, which has no distance."""
    if isinstance(value, str) or isinstance(other, str):
        return 0.0
    largest = max(abs(value), abs(other))
    return float(abs(value - other) / largest) if largest else 0.0
