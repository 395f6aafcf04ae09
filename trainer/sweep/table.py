"""The trials of a sweep as a table: live on a terminal, a line for each that ends elsewhere."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from trainer.config.fields import show
from trainer.sweep.description import Sweep
from trainer.sweep.store import Trial

MOST_ROWS = 20
STYLES = {"done": "green", "stopped": "yellow", "failed": "bold red", "running": "cyan", "interrupted": "dim"}


class LiveTable:
    """Shows trials while they run; drawn by its caller, no thread of its own."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._console = Console(force_jupyter=False)
        on_terminal = sys.stdout.isatty() and self._console.is_interactive
        self._live = Live(console=self._console, auto_refresh=False, transient=True) if on_terminal else None
        self._told: dict[int, str] = {}

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
            rows = [*running, *ranked(self._sweep, [trial for trial in trials if trial.state != "running"])]
            self._live.update(table(self._sweep, rows[: min(MOST_ROWS, self._console.height - 6)]), refresh=True)
            return
        for trial in trials:
            if self._told.get(trial.number) != trial.state:
                self._told[trial.number] = trial.state
                print(line(self._sweep, trial), flush=True)


def ranked(sweep: Sweep, trials: list[Trial]) -> list[Trial]:
    """The trials, best first; those without a value last."""
    sign = -1 if sweep.goal == "maximize" else 1
    return sorted(trials, key=lambda trial: (trial.value is None, sign * (trial.value or 0.0), trial.number))


def table(sweep: Sweep, trials: list[Trial]) -> Table:
    """One row for each trial. On a narrow terminal the reasons give way, not the numbers."""
    names = varying(sweep)
    headings = ["trial", "state", sweep.metric, *names, "time"]
    rows = [
        [str(t.number), t.state, shown(t), *(show_value(t.values[name]) for name in names), f"{t.seconds:.0f} s"]
        for t in trials
    ]
    grid = Table(box=None, expand=True, pad_edge=False, header_style="dim", padding=(0, 1))
    for place, heading in enumerate(headings):
        width = max(len(cells[place]) for cells in [headings, *rows])
        grid.add_column(heading, justify="left" if heading == "state" else "right", no_wrap=True, min_width=width)
    grid.add_column("", overflow="ellipsis", no_wrap=True, ratio=1)  # what is left of the width
    for trial, cells in zip(trials, rows, strict=True):
        styled = [Text(cell, STYLES[trial.state] if place == 1 else "") for place, cell in enumerate(cells)]
        grid.add_row(*styled, Text(trial.reason))
    return grid


def line(sweep: Sweep, trial: Trial) -> str:
    values = " ".join(f"{name}={show_value(trial.values[name])}" for name in varying(sweep))
    if trial.state == "running":
        return f"trial {trial.number}  {values}"
    reason = f"  {trial.reason}" if trial.reason else ""
    return f"trial {trial.number}  {trial.state}  {sweep.metric} {shown(trial)}  {trial.seconds:.0f} s{reason}"


def varying(sweep: Sweep) -> list[str]:
    """The parameters that have more than one value."""
    return [parameter.name for parameter in sweep.parameters if len(parameter.choices) != 1]


def shown(trial: Trial) -> str:
    """A trial's value, or the last one that a running trial logged."""
    value = trial.value if trial.value is not None else (trial.curve[-1] if trial.curve else None)
    return "–" if value is None else f"{value:.4g}"


def show_value(value: object) -> str:
    """A parameter's value in few characters."""
    return f"{value:.4g}" if isinstance(value, float) else show(value)
