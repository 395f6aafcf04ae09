"""`metrics.jsonl`: every logged row, a JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.errors import LockstepError
from trainer.storage.files import write_text


class MetricsFile:
    """The open file. A resumed run keeps its first `keep_rows` rows: those its checkpoint knows of.

    Attributes: `rows`, how many the file holds.
    """

    def __init__(self, path: Path, *, keep_rows: int = 0) -> None:
        kept = _complete_lines(path)[:keep_rows] if path.exists() else []
        write_text(path, "".join(kept))
        self.rows = len(kept)
        self._file = path.open("a")

    def log(self, row: Mapping[str, Any]) -> None:
        """Append a row, keys in their order. Floats read back exactly; NaN and infinities stay what they are."""
        self._file.write(json.dumps(dict(row)) + "\n")
        self._file.flush()
        self.rows += 1

    def close(self) -> None:
        self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, which may be growing: a last line without its end is left out."""
    rows = []
    for number, line in enumerate(_complete_lines(path), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise LockstepError(f"{path}, line {number} is not a row of metrics; remove that line") from None
    return rows


def _complete_lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
