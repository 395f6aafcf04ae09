"""Which rows of a run's earlier sessions W&B has: a resumed run sends what is missing, and nothing twice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


class Sent:
    """`earlier` holds the rows of the earlier sessions, of which the first `kept` count; later ones are made again.

    `summary` is what the server knows of the run, its newest value of every name. Without a server it is None, and
    the earlier rows lie in the earlier sessions' own files.
    """

    def __init__(self, earlier: Sequence[Row], kept: int, summary: Mapping[str, Any] | None) -> None:
        has = [summary is None or _is_received(row, summary) for row in earlier]
        self.missing = [row for row, there in zip(earlier[:kept], has, strict=False) if not there]
        self._known = {_name(row) for row, there in zip(earlier, has, strict=True) if there}
        self.last_step = max((int(row["step"]) for row, there in zip(earlier, has, strict=True) if there), default=0)

    def has(self, row: Row) -> bool:
        return _name(row) in self._known


def _name(row: Row) -> tuple[float, frozenset[str]]:
    """A step has a row of its interval and perhaps one of its epoch, which differ in their columns."""
    return row["step"], frozenset(row)


def _is_received(row: Row, summary: Mapping[str, Any]) -> bool:
    """Rows arrive in order, so only at the newest step is it a question of values."""
    last = summary.get("step", -1)
    if row["step"] != last:
        return bool(row["step"] < last)
    return all(summary.get(name) == value for name, value in row.items() if _is_plain(value))


def _is_plain(value: Any) -> bool:
    """Whether the server gives the value back as it was: infinities and NaN it may not."""
    return isinstance(value, str) or math.isfinite(value)
