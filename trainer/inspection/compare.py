"""Two runs side by side: config, data, environment, and the first logged step at which they differ."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.core.metrics import TIMINGS
from trainer.errors import LockstepError
from trainer.reporting.jsonl import read_rows
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
    - `steps`: the steps that both runs logged; `only` counts those that one run alone logged.
    - `parted`: of each column that differs, the first such step and its values.
    - `gaps`: of each column that differs, the largest difference over all steps, relative to the larger value.
    """

    config: Changes
    free: Changes
    data: Changes
    environment: Changes
    steps: list[int]
    only: tuple[int, int]
    parted: dict[str, Difference]
    gaps: dict[str, float]

    @property
    def same(self) -> bool:
        """True if both runs logged some step, and every value that both logged is the same."""
        return bool(self.steps) and not self.parted


def compare(first: Path, second: Path) -> Comparison:
    """Compare two run directories; checkpoints are not needed.

    Raises `ConfigError` or `LockstepError` if one of them is no run or lacks a file.
    """
    config, free = _compare_configs(first, second)
    data, environment = _compare_environments(first, second)
    ours = _read_columns(first)
    theirs = _read_columns(second)
    steps = _shared_steps(ours, theirs)
    parted, gaps = _compare_columns(ours, theirs)
    return Comparison(
        config=config,
        free=free,
        data=data,
        environment=environment,
        steps=sorted(steps),
        only=(len(_all_steps(ours) - steps), len(_all_steps(theirs) - steps)),
        parted=parted,
        gaps=gaps,
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
            config[name] = change
    return config, free


def _compare_environments(first: Path, second: Path) -> tuple[Changes, Changes]:
    """What differs in the data's fingerprints, and in everything else."""
    ours = _read_environment(first)
    theirs = _read_environment(second)
    data = changed_keys(ours.pop("data"), theirs.pop("data"))
    for values in (ours, theirs):  # host names, clocks and disks differ without meaning anything
        values.pop("ranks", None)
    return data, changed_keys(ours, theirs)


def _compare_columns(ours: Columns, theirs: Columns) -> tuple[dict[str, Difference], dict[str, float]]:
    """The first difference and the largest one, of each column that differs.

    Column by column, since an epoch's row and the row of its last step have the same step.
    """
    parted: dict[str, Difference] = {}
    gaps: dict[str, float] = {}
    for name in _shared_columns(ours, theirs):
        for step in sorted(ours[name].keys() & theirs[name].keys()):
            a = ours[name][step]
            b = theirs[name][step]
            if repr(a) == repr(b):  # as text, since NaN does not equal itself
                continue
            parted.setdefault(name, (step, a, b))
            gaps[name] = max(gaps.get(name, 0.0), _relative_difference(a, b))
    return parted, gaps


def _shared_steps(ours: Columns, theirs: Columns) -> set[int]:
    steps: set[int] = set()
    for name in _shared_columns(ours, theirs):
        steps |= ours[name].keys() & theirs[name].keys()
    return steps


def _shared_columns(ours: Columns, theirs: Columns) -> set[str]:
    """The columns that both runs logged, except those that no two runs share: times."""
    return ours.keys() & theirs.keys() - set(TIMINGS)


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
