"""Which rows a tracker has been given, kept in the run's directory: a resumed run sends what is missing, none twice."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trainer.reporting.trackers.base import Row


class Received:
    """The newest row that a tracker was given, and the tracker's `id`, in a small file.

    Rows come in the order of their steps. One step may have several rows, which differ in their columns.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        content = _read(file)
        self.id: str | None = content.get("id")
        self._step: int = content.get("step", -1)
        self._columns: list[str] = content.get("columns", [])

    def has(self, row: Row) -> bool:
        step = int(row["step"])
        if step != self._step:
            return step < self._step
        return _columns_of(row) in self._columns

    def missing(self, rows: Iterable[Row]) -> list[Row]:
        return [row for row in rows if not self.has(row)]

    def add(self, row: Row) -> None:
        self._add(row)
        self.write()

    def replace(self, rows: Sequence[Row]) -> None:
        """The tracker has these rows and no others."""
        self._step, self._columns = -1, []
        for row in rows:
            self._add(row)

    def write(self) -> None:
        content = {"id": self.id, "step": self._step, "columns": self._columns}
        # Not synced to the disk: after a power failure the worst is a row sent twice.
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps(content))
        partial.replace(self._file)

    def _add(self, row: Row) -> None:
        step = int(row["step"])
        if step != self._step:
            self._step, self._columns = step, []
        self._columns.append(_columns_of(row))


def _columns_of(row: Row) -> str:
    return " ".join(sorted(row))


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):  # a new run, or a damaged file
        return {}
    return content if isinstance(content, dict) else {}
