"""The trials of a sweep as a table: live on a terminal, a line for each start and end elsewhere."""

from __future__ import annotations

import math
import sys

from rich.live import Live
from rich.table import Table
from rich.text import Text

from trainer.config.fields import show
from trainer.config.secrets import redacted_value
from trainer.process.terminal import is_terminal
from trainer.reporting.plain_text import plain_console
from trainer.sweep.description import Sweep
from trainer.sweep.study import State, Trial

MAX_ROWS = 20
STYLES: dict[State, str] = {
    "done": "green",
    "stopped": "yellow",
    "failed": "bold red",
    "running": "cyan",
    "interrupted": "dim",
}


class LiveTable:
    """Shows trials while they run. It has no thread: its caller says when to draw."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._console = plain_console()
        self._live: Live | None = None
        if is_terminal(sys.stdout) and self._console.is_interactive:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._printed_states: dict[int, State] = {}

    def __enter__(self) -> LiveTable:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, trials: list[Trial]) -> None:
        if self._live is not None:
            running = [trial for trial in trials if trial.state == "running"]
            others = [trial for trial in trials if trial.state != "running"]
            # Those that run come first: the table may be cut off.
            rows = [*running, *sort_trials(self._sweep, others)]
            height = min(MAX_ROWS, self._console.height - 6)
            self._live.update(build_table(self._sweep, rows[:height]), refresh=True)
            return
        for trial in trials:
            if self._printed_states.get(trial.number) != trial.state:
                self._printed_states[trial.number] = trial.state
                print(format_line(self._sweep, trial), flush=True)


def sort_trials(sweep: Sweep, trials: list[Trial]) -> list[Trial]:
    """The trials, best first; those without a value last."""
    sign = -1 if sweep.goal == "maximize" else 1

    def position(trial: Trial) -> float:
        return math.inf if trial.value is None else sign * trial.value

    return sorted(trials, key=position)


def build_table(sweep: Sweep, trials: list[Trial]) -> Table:
    """One row for each trial. On a narrow terminal the reasons are cut, not the numbers."""
    rows = [list_cells(sweep, trial) for trial in trials]
    table = Table(
        box=None, expand=True, pad_edge=False, header_style="dim", padding=(0, 1)
    )
    for heading, *cells in zip(list_headings(sweep), *rows, strict=True):
        # Or rich would cut numbers where the terminal is narrow.
        width = max(map(len, [heading, *cells]))
        table.add_column(
            heading,
            justify="left" if heading == "state" else "right",
            no_wrap=True,
            min_width=width,
        )
    # The reason: what is left of the width.
    table.add_column("", overflow="ellipsis", no_wrap=True, ratio=1)
    for trial, row in zip(trials, rows, strict=True):
        number, state, *numbers, reason = map(Text, [*row, trial.reason])
        state.stylize(STYLES[trial.state])
        table.add_row(number, state, *numbers, reason)
    return table


def list_headings(sweep: Sweep) -> list[str]:
    return ["trial", "state", sweep.metric, *list_varying(sweep), "time"]


def list_cells(sweep: Sweep, trial: Trial) -> list[str]:
    """A trial's cells, in the order of the headings."""
    values = [
        format_value(redacted_value(name, trial.values[name]))
        for name in list_varying(sweep)
    ]
    return [
        str(trial.number),
        trial.state,
        format_metric(trial),
        *values,
        f"{trial.seconds:.0f} s",
    ]


def format_line(sweep: Sweep, trial: Trial) -> str:
    """What is printed as a trial changes its state."""
    if trial.state == "running":
        values = [
            f"{name}={format_value(redacted_value(name, trial.values[name]))}"
            for name in list_varying(sweep)
        ]
        return f"trial {trial.number}  {' '.join(values)}"
    metric = f"{sweep.metric} {format_metric(trial)}"
    parts = [f"trial {trial.number}", trial.state, metric, f"{trial.seconds:.0f} s"]
    if trial.reason:
        parts.append(trial.reason)
    return "  ".join(parts)


def list_varying(sweep: Sweep) -> list[str]:
    """The names of the parameters that have more than one value."""
    return [
        parameter.name for parameter in sweep.parameters if len(parameter.choices) != 1
    ]


def format_metric(trial: Trial) -> str:
    """A trial's value, or the last one that a running trial logged."""
    value = trial.value
    if value is None and trial.curve:
        value = trial.curve[-1]
    return "–" if value is None else f"{value:.4g}"


def format_value(value: object) -> str:
    """A parameter's value in few characters."""
    return f"{value:.4g}" if isinstance(value, float) else show(value)
