"""`metrics.jsonl`: every logged row, one JSON object a line."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.errors import LockstepError
from trainer.storage.files import named_in_errors, write_text


class MetricsFile:
    """The file, open for appending. A resumed run keeps its first `keep_rows` rows, which its checkpoint counted.

    Attributes: `rows`, the number of rows in the file.
    """

    def __init__(self, path: Path, *, keep_rows: int = 0) -> None:
        # A crash may have left half a line, and rows after the checkpoint; both go. So does a damaged line, which
        # must not keep a run from going on.
        lines = _complete_lines(path)[:keep_rows] if path.exists() else []
        lines = [line for line in lines if _parse(line) is not None]
        write_text(path, "".join(lines))
        self.rows = len(lines)
        self._path = path
        self._file = path.open("a")

    def log(self, row: Mapping[str, Any]) -> None:
        """Append a row, its keys in their order. Floats read back exactly, NaN and infinities included."""
        with named_in_errors(self._path):
            self._file.write(json.dumps(dict(row)) + "\n")
            # To the operating system, so that a killed process loses no row.
            self._file.flush()
        self.rows += 1

    def sync(self) -> None:
        """Wait until the disk holds every row: a checkpoint counts them."""
        with named_in_errors(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        # What is left to write is a row whose `log` has failed, and has said so: the rest of a run's end must go on.
        with suppress(OSError):
            self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that may still be growing: an incomplete last line is left out.

    Raises `LockstepError` for a complete line that is not JSON.
    """
    rows = []
    for number, line in enumerate(_complete_lines(path), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise LockstepError(
                f"{path}, line {number} is not a row of metrics; remove that line"
            ) from None
    return rows


def readable_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, without those that are damaged."""
    rows = map(_parse, _complete_lines(path))
    return [row for row in rows if row is not None]


def _parse(line: str) -> dict[str, Any] | None:
    """The row of a line; None if it is damaged."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _complete_lines(path: Path) -> list[str]:
    return [
        line
        for line in path.read_text(errors="replace").splitlines(keepends=True)
        if line.endswith("\n")
    ]
