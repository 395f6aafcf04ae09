"""`metrics.csv`: the rows of `metrics.jsonl` as a table with a column for each name."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

from trainer.reporting.trackers.base import Row, Session, Tracker
from trainer.storage.files import write_text


class CsvTracker(Tracker):
    """A CSV file at `file`, a path from the run's directory. A cell is empty where its row has no such value.

    Raises `ValueError` unless the file's name ends in .csv: no other file of a run does, so none is overwritten.
    """

    cuts: ClassVar[bool] = True

    def __init__(self, file: str = "metrics.csv") -> None:
        if not file.endswith(".csv"):
            raise ValueError(
                f"the name of file must end in .csv, and {file!r} does not"
            )
        self._name = file
        self._columns: list[str] = []

    def target(self, directory: Path) -> Path:
        """What it writes, where the run's directory is `directory`."""
        return directory / self._name

    def begin(self, session: Session) -> None:
        self._path: Path = self.target(session.directory)
        self._columns = list(dict.fromkeys(chain.from_iterable(session.rows)))
        self._write_whole(session.rows)

    def describe(self) -> str:
        return str(self._path)

    def log(self, row: Row) -> None:
        new = [name for name in row if name not in self._columns]
        if new:
            # The first row of a kind, so this is rare.
            rows = self._read()
            self._columns += new
            self._write_whole([*rows, row])
            return
        with self._path.open("a", newline="") as file:
            self._writer(file).writerow(row)

    def _read(self) -> list[dict[str, str]]:
        with self._path.open(newline="") as file:
            return list(csv.DictReader(file))

    def _write_whole(self, rows: Sequence[Row]) -> None:
        text = io.StringIO()
        writer = self._writer(text)
        writer.writeheader()
        writer.writerows(rows)
        write_text(self._path, text.getvalue())

    def _writer(self, file: Any) -> csv.DictWriter[str]:
        return csv.DictWriter(file, self._columns, lineterminator="\n")
