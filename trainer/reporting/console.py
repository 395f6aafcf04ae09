"""What a run says on stdout: rich, with a live bar, on a terminal; plain lines of the same columns elsewhere.

The bar is drawn by time, never by step, and by the training loop's own thread: none runs in the background.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Mapping, Sequence
from time import monotonic

import rich.console
from rich import box
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

BAR_SECONDS = 0.1  # between drawings of the bar
LINE_SECONDS = 30.0  # between progress lines where there is no bar
WIDEST_BAR = 110  # columns of its line
HEADING_EVERY = 25  # epoch lines
NUMBER, GAP = 8, "  "  # the width of a column of numbers, and what parts two columns
ABSENT = "–"
QUIET, BEST, BAD = "dim", "green", "bold red"

Facts = Sequence[tuple[str, str]]
Row = Mapping[str, float]
Group = tuple[str, list[str], int]  # a metric's name, the phases shown, its width in columns


class Console:
    """A run's voice. Only the main process speaks: elsewhere it is inactive, and no call does anything."""

    def __init__(self, *, active: bool) -> None:
        self._active = active
        self._rich = rich.console.Console(force_jupyter=False)
        self._on_terminal = active and sys.stdout.isatty() and self._rich.is_interactive
        self._interval = BAR_SECONDS if self._on_terminal else LINE_SECONDS
        self._live: Live | None = None
        self._progress = _Progress(0, 1, 0)
        self._latest: Row = {}
        self._epochs = _EpochTable()
        self._due = math.inf  # when to draw the bar, or to print a progress line, next
        if active and isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a star must not end a run where stdout is ASCII

    def header(self, facts: Facts) -> None:
        """What is about to run, as aligned `key  value` lines."""
        if self._on_terminal:
            self._rich.print(_grid(facts))
            self._rich.print()
        else:
            self._print(*_aligned(facts), Text())

    def begin(self, total_steps: int, steps_per_epoch: int, first_step: int) -> None:
        """Start the bar of a run of `total_steps`, of which earlier sessions did `first_step`."""
        self.close()
        self._progress = _Progress(total_steps, steps_per_epoch, first_step)
        if self._on_terminal:
            live = Live(console=self._rich, get_renderable=self._bar, auto_refresh=False, transient=True)
            live.start(refresh=True)
            self._live = live
        if self._active:
            self._due = 0.0

    def advance(self, step_number: int) -> None:
        """`step_number` steps are done. Called every step: it mostly but looks at the clock."""
        self._progress.step = step_number
        if monotonic() >= self._due:
            self._show_progress()

    def log(self, row: Row) -> None:
        """Take the newest logged numbers, to show when the bar is drawn next."""
        self._latest = row

    def epoch(self, epoch: int, epochs: int, row: Row, seconds: float, best: bool) -> None:
        """One line for epoch `epoch` (the first is 1) of `epochs`; `best` marks it as the best so far."""
        if not self._active:
            return
        width = self._rich.width if self._on_terminal else sys.maxsize
        self._print(*self._epochs.lines(epoch, epochs, row, seconds=seconds, best=best, width=width))
        if self._due < math.inf:
            self._due = monotonic() + self._interval

    def note(self, text: str) -> None:
        """`text` as it is, above the bar."""
        if self._on_terminal:
            self._rich.print(Text(text))  # a sentence may take two lines of a terminal
        else:
            self._print(Text(text))

    def summary(self, facts: Facts) -> None:
        """What the run came to. Ends the bar."""
        self.close()
        if self._on_terminal:
            self._rich.print()
            self._rich.print(Panel.fit(_grid(facts), box=box.ROUNDED, border_style=QUIET))
        else:
            self._print(Text(), *_aligned(facts))

    def close(self) -> None:
        """End the bar. May be called at any time, and again."""
        self._due = math.inf
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def _print(self, *lines: Text) -> None:
        """Print each line whole on a line of its own; on a terminal, as much of it as fits."""
        for line in lines if self._active else ():
            if self._on_terminal:
                self._rich.print(line, no_wrap=True, overflow="crop")
            else:
                print(line.plain.rstrip(), flush=True)

    def _show_progress(self) -> None:
        first = self._progress.start_clock()
        if self._live is not None:
            self._live.refresh()
        elif not first:
            text = Text(f"epoch {self._progress.position()}{GAP}{self._progress.times()}{GAP}")
            self._print(text.append_text(self._numbers()))
        self._due = monotonic() + self._interval

    def _bar(self) -> Text:
        """A blank line and the bar's two: the first as wide as the terminal, within reason."""
        left, right = f"epoch {self._progress.position()}", self._progress.times()
        room = min(self._rich.width - 1, WIDEST_BAR)
        width = max(0, room - len(left) - len(right) - 2 * len(GAP))
        filled = math.floor(width * self._progress.fraction)
        text = Text("\n", no_wrap=True, overflow="ellipsis")
        text.append(left, "bold").append(GAP)
        text.append("━" * filled, "cyan").append("━" * (width - filled), QUIET)
        return text.append(f"{GAP}{right}\n").append_text(self._numbers())

    def _numbers(self) -> Text:
        """The newest numbers, in the order in which they matter: a narrow terminal cuts the end off."""
        progress, row = self._progress, self._latest
        shown = {n: _number(n, row[f"train/{n}"]) for n in ("loss", "accuracy") if f"train/{n}" in row}
        shown["step"] = f"{progress.step:,}/{progress.total_steps:,}"
        if "lr" in row:
            shown["lr"] = _compact(row["lr"])
        if "samples_per_second" in row:
            shown["samples/s"] = f"{row['samples_per_second']:,.0f}"
        text = Text()
        for name, value in shown.items():
            text.append(GAP if text else "").append(f"{name} ", QUIET).append(value, _style(value))
        return text


class _Progress:
    """Where the run is, and how fast it goes."""

    def __init__(self, total_steps: int, steps_per_epoch: int, first_step: int) -> None:
        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch
        self.step = first_step  # steps done
        self._began = monotonic()
        self._timed_from: tuple[float, int] | None = None  # a time, and the steps done by then

    def start_clock(self) -> bool:
        """Time the steps from here on, if none are timed yet: the first one warms up and tells no rate."""
        if self._timed_from is not None:
            return False
        self._timed_from = monotonic(), self.step
        return True

    @property
    def fraction(self) -> float:
        return self.step / max(1, self.total_steps)

    def position(self) -> str:
        epochs = str(math.ceil(self.total_steps / self.steps_per_epoch))
        epoch = max(1, math.ceil(self.step / self.steps_per_epoch))
        return f"{epoch:>{len(epochs)}}/{epochs}"

    def times(self) -> str:
        """The share done, the time since the session began, and the time to go at this session's pace."""
        now, to_go = monotonic(), ABSENT
        if self._timed_from is not None and self.step > self._timed_from[1]:
            then, step = self._timed_from
            to_go = _clock((now - then) / (self.step - step) * (self.total_steps - self.step))
        return f"{math.floor(100 * self.fraction):3d} %{GAP}{_clock(now - self._began)}{GAP}eta {to_go}"


class _EpochTable:
    """The epoch lines: a column for each `train/` and `val/` metric met so far, with a heading."""

    def __init__(self) -> None:
        self._metrics: dict[str, set[str]] = {"loss": set()}  # name → the phases it was met in
        self._headings: list[Text] = []
        self._lines_below = 0

    def lines(self, epoch: int, epochs: int, row: Row, *, seconds: float, best: bool, width: int) -> list[Text]:
        """The line of an epoch, below a heading where one is due, with the metrics that fit in `width`."""
        for key in row:
            phase, _, name = key.partition("/")
            if phase in ("train", "val"):
                self._metrics.setdefault(name, set()).add(phase)
        label = max(len("epoch"), len(f"{epochs}/{epochs}"))
        groups = self._groups(width - label - 2 * (len(GAP) + NUMBER) - len(f"{GAP}★"))
        line = Text(f"{epoch}/{epochs}".rjust(label))
        for name, phases, group_width in groups:
            line.append(" " * (group_width - _width(phases)))
            for phase in phases:
                key = f"{phase}/{name}"
                value = _number(name, row[key]) if key in row else ABSENT
                colour = BEST if best and phase == "val" else ""
                line.append(GAP).append(value.rjust(NUMBER), _style(value, colour))
        rate = _compact(row["lr"]) if "lr" in row else ABSENT
        line.append(f"{GAP}{rate:>{NUMBER}}{GAP}{_duration(seconds):>{NUMBER}}", QUIET)
        line.append(f"{GAP}★" if best else "", BEST)
        return [*self._due_headings(label, groups), line]

    def _groups(self, room: int) -> list[Group]:
        """The metrics that fit in `room` columns."""
        groups: list[Group] = []
        for name, met in self._metrics.items():
            phases: list[str] = [phase for phase in ("train", "val") if phase in met]
            width = max(_width(phases), len(name))
            room -= len(GAP) + width
            if phases and room >= 0:
                groups.append((name, phases, width))
        return groups

    def _due_headings(self, label: int, groups: list[Group]) -> list[Text]:
        names, phases = " " * label, "epoch".rjust(label)
        for name, group_phases, width in groups:
            names += GAP + (f" {name} " if len(name) + 2 <= width else name).center(width, "─")
            phases += GAP + GAP.join(f"{phase:>{NUMBER}}" for phase in group_phases).rjust(width)
        phases += f"{GAP}{'lr':>{NUMBER}}{GAP}{'time':>{NUMBER}}"
        headings = [Text(names, QUIET), Text(phases, QUIET)]
        if headings == self._headings and self._lines_below < HEADING_EVERY:
            self._lines_below += 1
            return []
        blank = [Text()] if self._headings else []
        self._headings, self._lines_below = headings, 1
        return blank + headings


def _width(phases: Sequence[str]) -> int:
    return len(phases) * (NUMBER + len(GAP)) - len(GAP)


def _grid(facts: Facts) -> Table:
    grid = Table.grid(padding=(0, len(GAP)), pad_edge=False)
    grid.add_column(style=QUIET, no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts:
        grid.add_row(Text(name), Text(value))
    return grid


def _aligned(facts: Facts) -> list[Text]:
    width = max((len(name) for name, _ in facts), default=0)
    return [Text(f"{name:<{width}}{GAP}{value}") for name, value in facts]


def _style(value: str, otherwise: str = "") -> str:
    return BAD if value in ("nan", "inf", "-inf") else otherwise


def _number(name: str, value: float) -> str:
    """A metric in at most 8 characters: an accuracy with four decimals, others with what digits tell.

    >>> [_number("loss", x) for x in (0.03124, 123.456, 0.000312)]
    ['0.0312', '123.456', '3.1e-04']
    """
    size = abs(value)
    if "accuracy" in name or size == 0 or 1e-3 <= size < 100:
        return f"{value:.4f}"
    return f"{value:.6g}" if 100 <= size < 1e6 else f"{value:.1e}"


def _compact(value: float) -> str:
    """A learning rate in few characters.

    >>> [_compact(x) for x in (0.05, 0.0001, 0.000125, 0.0)]
    ['0.05', '1e-04', '1.25e-04', '0']
    """
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{exponent}"


def _clock(seconds: float) -> str:
    """
    >>> _clock(75), _clock(3675)
    ('1:15', '1:01:15')
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 59.95 else _clock(seconds)
