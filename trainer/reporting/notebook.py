"""The live table of a run in a notebook: its progress, and a line for each epoch."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from trainer.reporting.formats import (
    ABSENT,
    Row,
    format_duration,
    format_learning_rate,
    format_metric,
)

MAX_EPOCHS = 30  # shown; the whole table is sent again with every update
# What the names of metrics begin with; a set of its own has another part in between: val/clean/accuracy.
PHASES = ("train", "val", "val_ema")


def is_notebook() -> bool:
    """True in a notebook's kernel, whose output can be changed later. IPython in a terminal is a terminal."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


class NotebookTable:
    """What a cell shows of a run, as HTML with plain text beside it. Drawn by `show`, again and again."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._epochs: list[tuple[str, Row, float, bool]] = []

    def add(self, label: str, row: Row, seconds: float, best: bool) -> None:
        """Add the line of an epoch; `best` marks it."""
        self._epochs.append((label, dict(row), seconds, best))

    def show(self, progress: str) -> None:
        """Show the table below a line of `progress`, in the place where it was shown first."""
        import IPython.display

        display: Any = IPython.display.display
        lines = self._lines()
        content = {
            "text/html": _as_html(progress, lines),
            "text/plain": _as_text(progress, lines),
        }
        if self._handle is None:
            self._handle = display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)

    def _lines(self) -> list[list[str]]:
        """The heading and the newest epochs' lines, as cells."""
        names = _metric_names(row for _, row, _, _ in self._epochs)
        lines = [["epoch", *names, "lr", "time", ""]]
        for label, row, seconds, best in self._epochs[-MAX_EPOCHS:]:
            cells = [label]
            for name in names:
                _, _, short = name.rpartition("/")
                value = row.get(name)
                cell = ABSENT if value is None else format_metric(short, value)
                cells.append(cell)
            rate = row.get("lr")
            cells += [
                ABSENT if rate is None else format_learning_rate(rate),
                format_duration(seconds),
                "★" if best else "",
            ]
            lines.append(cells)
        return lines


def _metric_names(rows: Iterable[Row]) -> list[str]:
    """The metrics' names in the order in which they came, those of one metric side by side."""
    metrics: dict[str, dict[str, None]] = {}
    for row in rows:
        for name in row:
            phase, _, rest = name.partition("/")
            if phase in PHASES:
                metric = rest.rpartition("/")[2]
                metrics.setdefault(metric, {})[name] = None
    return [name for names in metrics.values() for name in names]


def _as_html(progress: str, lines: Sequence[Sequence[str]]) -> str:
    heading, *body = lines
    text = [f"<pre>{escape(progress)}</pre>"] if progress else []
    if body:
        text.append("<table><thead>")
        text.append(_row_as_html("th", heading))
        text.append("</thead><tbody>")
        text += [_row_as_html("td", line) for line in body]
        text.append("</tbody></table>")
    return "".join(text)


def _row_as_html(tag: str, cells: Sequence[str]) -> str:
    inner = "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells)
    return f"<tr>{inner}</tr>"


def _as_text(progress: str, lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [progress] if progress else []
    if len(lines) > 1:
        for line in lines:
            cells = [
                cell.rjust(width) for cell, width in zip(line, widths, strict=True)
            ]
            text.append("  ".join(cells).rstrip())
    return "\n".join(text)
