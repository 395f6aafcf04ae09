"""What a run says on stdout: rich, with a live bar, on a terminal; elsewhere plain lines with the same columns.

In a notebook, a table takes the place of bar and epoch lines.

The training loop's own thread draws the bar, at most every `BAR_INTERVAL` seconds; no thread runs in the background.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Sequence
from time import monotonic

from rich import box
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from trainer.config.secrets import redacted_output
from trainer.process.terminal import is_terminal
from trainer.reporting.epoch_table import EpochTable
from trainer.reporting.formats import GAP, MUTED, Row
from trainer.reporting.notebook import NotebookTable, is_notebook
from trainer.reporting.plain_text import plain_console
from trainer.reporting.progress_bar import RunProgress

BAR_INTERVAL = 0.1  # seconds between drawings of the bar
TABLE_INTERVAL = 1.0  # seconds between those of a notebook's table, each of which is sent to a browser
LINE_INTERVAL = 30.0  # seconds between progress lines where there is no bar

Facts = Sequence[tuple[str, str]]


class Console:
    """A run's output on stdout. On every rank but the main one it is inactive, and no call does anything."""

    def __init__(self, *, active: bool) -> None:
        self._active = active
        self._rich = plain_console()
        is_shown = active and is_terminal(sys.stdout)
        self._on_terminal = is_shown and self._rich.is_interactive
        self._in_notebook = active and not self._on_terminal and is_notebook()
        self._interval = BAR_INTERVAL if self._on_terminal else LINE_INTERVAL
        if self._in_notebook:
            self._interval = TABLE_INTERVAL
        # Of a run that has begun in a notebook.
        self._table: NotebookTable | None = None
        self._progress: RunProgress | None = None  # of a run that has begun
        self._live: Live | None = None
        # When to draw the bar, or to print a progress line, next. Infinity outside a run and on inactive consoles
        # keeps `advance` at one comparison.
        self._next_drawing = math.inf
        self._latest_row: Row = {}
        self._epochs = EpochTable()
        if active and isinstance(sys.stdout, io.TextIOWrapper):
            # A "★" must not end a run where stdout is ASCII.
            sys.stdout.reconfigure(errors="replace")

    def header(self, facts: Facts) -> None:
        """Print what is about to run, as aligned `key  value` lines."""
        facts = _without_secrets(facts)
        if self._on_terminal:
            self._rich.print(_grid(facts))
            self._rich.print()
        else:
            self._print(*_align(facts), Text())

    def begin(self, total_steps: int, steps_per_epoch: int, first_step: int) -> None:
        """Start the bar of a run of `total_steps`; earlier sessions did the first `first_step` of them."""
        self.close()
        if not self._active:
            return
        self._progress = RunProgress(total_steps, steps_per_epoch, first_step)
        if self._in_notebook:
            self._table = NotebookTable()
        if self._on_terminal:
            # Without auto_refresh rich starts no thread, which would compete with the loop for the interpreter.
            self._live = Live(
                console=self._rich,
                get_renderable=self._bar,
                auto_refresh=False,
                transient=True,
            )
            self._live.start(refresh=True)
        self._next_drawing = 0.0

    def advance(self, step_number: int) -> None:
        """`step_number` steps are done. Called every step, so it usually only checks the clock."""
        if monotonic() >= self._next_drawing:
            self._show_progress(step_number)

    def log(self, row: Row) -> None:
        """Take the latest logged numbers; the next drawing of the bar shows them."""
        self._latest_row = row

    def name_sets(self, names: Sequence[str]) -> None:
        """The names of the validation sets, each a column of the epochs' lines."""
        self._epochs.name_sets(names)

    def epoch(
        self, epoch: int | str, epochs: int, row: Row, seconds: float, best: bool
    ) -> None:
        """Print the line of epoch `epoch` of `epochs`, counted from 1; `best` marks it as the best so far.

        Within an epoch `epoch` is a text, such as 2.50 for two and a half epochs done.
        """
        if not self._active:
            return
        if self._table is not None:
            self._table.add(f"{epoch}/{epochs}", row, seconds, best)
            self._next_drawing = 0.0
            return
        width = self._rich.width if self._on_terminal else sys.maxsize
        self._print(
            *self._epochs.lines(
                epoch, epochs, row, seconds=seconds, best=best, width=width
            )
        )
        # The epoch's line is news enough: no progress line right after it.
        if self._progress is not None:
            self._next_drawing = monotonic() + self._interval

    def note(self, text: str) -> None:
        """Print `text` above the bar, unchanged but for secrets."""
        text = redacted_output(text)
        if self._on_terminal:
            # Wraps: a sentence may take two lines of a terminal.
            self._rich.print(Text(text))
        else:
            self._print(Text(text))

    def summary(self, facts: Facts) -> None:
        """End the bar and print the run's results."""
        self.close()
        facts = _without_secrets(facts)
        if self._on_terminal:
            self._rich.print()
            self._rich.print(
                Panel.fit(_grid(facts), box=box.ROUNDED, border_style=MUTED)
            )
        else:
            self._print(Text(), *_align(facts))

    def close(self) -> None:
        """End the bar. May be called at any time, and again."""
        self._next_drawing = math.inf
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._table is not None:
            self._table.show("")
            self._table = None
        self._progress = None

    def _print(self, *lines: Text) -> None:
        """Print each line on a line of its own; a terminal crops it to its width."""
        if not self._active:
            return
        for line in lines:
            if self._on_terminal:
                self._rich.print(line, no_wrap=True, overflow="crop")
            else:
                print(line.plain.rstrip(), flush=True)

    def _bar(self) -> Text:
        return (
            self._progress.bar(self._rich.width)
            if self._progress is not None
            else Text()
        )

    def _show_progress(self, step_number: int) -> None:
        assert self._progress is not None
        is_first = self._progress.update(step_number, self._latest_row)
        if self._live is not None:
            self._live.refresh()
        elif self._table is not None:
            self._table.show(self._progress.line().plain)
        elif not is_first:
            # A line after the very first step could not say how long the run will take.
            self._print(self._progress.line())
        self._next_drawing = monotonic() + self._interval


def _without_secrets(facts: Facts) -> Facts:
    return [(name, redacted_output(text)) for name, text in facts]


def _grid(facts: Facts) -> Table:
    grid = Table.grid(padding=(0, len(GAP)), pad_edge=False)
    grid.add_column(style=MUTED, no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts:
        grid.add_row(Text(name), Text(value))
    return grid


def _align(facts: Facts) -> list[Text]:
    width = max((len(name) for name, _ in facts), default=0)
    return [Text(f"{name:<{width}}{GAP}{value}") for name, value in facts]
