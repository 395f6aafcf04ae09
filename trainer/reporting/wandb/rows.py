"""Which rows of a run's earlier sessions W&B has: a resumed run sends what is missing, and nothing twice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


class EarlierRows:
    """The rows of earlier sessions, and which of them W&B has received.

    Attributes: `missing`, the rows to send again; `last_step`, the newest step that W&B knows of, 0 for none.
    """

    def __init__(
        self, rows: Sequence[Row], valid_rows: int, summary: Mapping[str, Any] | None
    ) -> None:
        """Compare `rows` with the server's `summary` of the run: the newest value of every name.

        Only the first `valid_rows` are ever missing: the resumed run computes the others again. Without a server
        `summary` is None, and no row is missing, because the sessions' own files hold them.
        """
        self.missing: list[Row] = []
        self.last_step = 0
        self._received: set[tuple[float, frozenset[str]]] = set()
        for index, row in enumerate(rows):
            if summary is None or _is_received(row, summary):
                self._received.add(_identity(row))
                self.last_step = max(self.last_step, int(row["step"]))
            elif index < valid_rows:
                self.missing.append(row)

    def has_received(self, row: Row) -> bool:
        return _identity(row) in self._received


def _identity(row: Row) -> tuple[float, frozenset[str]]:
    """A step has the row of its interval and perhaps that of its epoch; the two differ in their columns."""
    return row["step"], frozenset(row)


def _is_received(row: Row, summary: Mapping[str, Any]) -> bool:
    # Rows arrive in order, so the values need comparing at the newest step only.
    newest_step = summary.get("step", -1)
    if row["step"] != newest_step:
        return bool(row["step"] < newest_step)
    comparable = [name for name, value in row.items() if _is_comparable(value)]
    return all(summary.get(name) == row[name] for name in comparable)


def _is_comparable(value: Any) -> bool:
    """True for text and finite numbers; the server may return infinities and NaN in another form."""
    return isinstance(value, str) or math.isfinite(value)
