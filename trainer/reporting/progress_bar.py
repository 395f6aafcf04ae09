"""A run's position and pace: as a bar with the latest numbers below it, or as one plain line."""

from __future__ import annotations

import math
from time import monotonic

from rich.text import Text

from trainer.reporting.formats import (
    ABSENT,
    GAP,
    MUTED,
    Row,
    format_clock,
    format_learning_rate,
    format_metric,
    number_style,
)

MAX_WIDTH = 110  # characters of the bar's line


class RunProgress:
    """The progress of a run of `total_steps`; earlier sessions did the first `first_step` of them."""

    def __init__(self, total_steps: int, steps_per_epoch: int, first_step: int) -> None:
        self._total_steps = total_steps
        self._steps_per_epoch = steps_per_epoch
        self._step = first_step
        self._row: Row = {}
        self._session_start = monotonic()
        # A time, and the steps done by then.
        self._pace_start: tuple[float, int] | None = None

    def update(self, step_number: int, row: Row) -> bool:
        """`step_number` steps are done and `row` has the latest numbers; True for the first update of all."""
        self._step = step_number
        self._row = row
        is_first = self._pace_start is None
        if is_first:
            # The first step warms up (cuDNN, compilation), so the pace counts from its end.
            self._pace_start = monotonic(), step_number
        return is_first

    def line(self) -> Text:
        return Text(f"{self._position()}{GAP}{self._times()}{GAP}").append_text(
            self._numbers()
        )

    def bar(self, terminal_width: int) -> Text:
        """A blank line, the bar's line and the line of numbers.

        Plain text: `rich.progress` takes almost four times as long to draw, and the training loop waits for it.
        """
        position = self._position()
        times = self._times()
        line_width = min(terminal_width - 1, MAX_WIDTH)
        beside_bar = len(position) + len(times) + 2 * len(GAP)
        bar_width = max(0, line_width - beside_bar)
        filled = math.floor(bar_width * self._fraction)
        text = Text("\n", no_wrap=True, overflow="ellipsis")
        text.append(position, "bold")
        text.append(GAP)
        text.append("━" * filled, "cyan")
        text.append("━" * (bar_width - filled), MUTED)
        text.append(f"{GAP}{times}\n")
        return text.append_text(self._numbers())

    @property
    def _fraction(self) -> float:
        return self._step / max(1, self._total_steps)

    def _position(self) -> str:
        epochs = math.ceil(self._total_steps / self._steps_per_epoch)
        epoch = max(1, math.ceil(self._step / self._steps_per_epoch))
        return f"epoch {epoch:>{len(str(epochs))}}/{epochs}"

    def _times(self) -> str:
        """The share done, the time since the session began, and the time left at this session's mean pace.

        The mean, evaluations and checkpoints included: an estimate from the latest steps alone, as rich's own, is
        several times too long after each evaluation and too short before it.
        """
        now = monotonic()
        # Rounded down: 100 % means done.
        percent = math.floor(100 * self._fraction)
        eta = ABSENT
        if self._pace_start is not None and self._step > self._pace_start[1]:
            start, start_step = self._pace_start
            steps_done = self._step - start_step
            steps_left = self._total_steps - self._step
            seconds_per_step = (now - start) / steps_done
            eta = format_clock(seconds_per_step * steps_left)
        elapsed = format_clock(now - self._session_start)
        return GAP.join([f"{percent:3d} %", elapsed, f"eta {eta}"])

    def _numbers(self) -> Text:
        """The latest numbers, the most important first: a narrow terminal cuts the end off."""
        row = self._row
        numbers = {}
        for name in ("loss", "accuracy"):
            if f"train/{name}" in row:
                numbers[name] = format_metric(name, row[f"train/{name}"])
        numbers["step"] = f"{self._step:,}/{self._total_steps:,}"
        if "lr" in row:
            numbers["lr"] = format_learning_rate(row["lr"])
        if "samples_per_second" in row:
            numbers["samples/s"] = f"{row['samples_per_second']:,.0f}"

        text = Text()
        for name, number in numbers.items():
            if text:
                text.append(GAP)
            text.append(f"{name} ", MUTED).append(number, number_style(number))
        return text
