"""The console's epoch lines: one column for each `train/` and `val/` metric, below a heading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from trainer.reporting.formats import (
    ABSENT,
    COLUMN_WIDTH,
    GAP,
    GOOD,
    MUTED,
    NUMBER_WIDTH,
    Row,
    column,
    format_duration,
    format_learning_rate,
    format_metric,
    number_style,
)

# What the names of metrics begin with, and what the columns are called.
TRAIN = {"train": "train"}
VAL = {"val": "val", "val_ema": "val ema"}
HEADING_EVERY = 25  # epoch lines
STAR = f"{GAP}★"


@dataclass(frozen=True)
class _Group:
    """The columns of one metric: one for each phase in which it was logged."""

    name: str
    phases: dict[str, str]  # with their columns' headings

    @property
    def columns_width(self) -> int:
        return len(self.phases) * COLUMN_WIDTH

    @property
    def width(self) -> int:
        """Characters, gaps included. A long name takes more than its columns."""
        return max(self.columns_width, len(GAP) + len(self.name))

    def title(self) -> str:
        room = self.width - len(GAP)
        name = f" {self.name} " if len(self.name) + 2 <= room else self.name
        return GAP + name.center(room, "─")

    def subtitle(self) -> str:
        headings = [heading[:NUMBER_WIDTH] for heading in self.phases.values()]
        return "".join(map(column, headings)).rjust(self.width)

    def values(self, row: Row, best: bool) -> Text:
        text = Text(" " * (self.width - self.columns_width))
        for phase in self.phases:
            value = row.get(f"{phase}/{self.name}")
            number = ABSENT if value is None else format_metric(self.name, value)
            colour = GOOD if best and phase.startswith("val") else ""
            text.append(column(number), number_style(number, colour))
        return text


class EpochTable:
    """Remembers the metrics logged so far, so that the columns of all lines are aligned."""

    def __init__(self) -> None:
        self._headings_of_phases = TRAIN | VAL
        # By metric; the loss always comes first.
        self._phases: dict[str, set[str]] = {"loss": set()}
        self._label_width = len("epoch")
        self._headings: list[Text] = []
        self._lines_below = 0  # epoch lines since the last heading

    def name_sets(self, names: Sequence[str]) -> None:
        """Give each named validation set a column of its own, in this order."""
        of_sets = {f"val/{name}": name for name in names}
        of_sets |= {f"val_ema/{name}": f"{name} ema" for name in names}
        # Last `val`, for what has no set's name.
        self._headings_of_phases = TRAIN | of_sets | VAL

    def lines(
        self,
        epoch: int | str,
        epochs: int,
        row: Row,
        *,
        seconds: float,
        best: bool,
        width: int,
    ) -> list[Text]:
        """The line of an epoch with the metrics that fit in `width` characters, below a heading where one is due."""
        self._add_metrics(row)
        label = f"{epoch}/{epochs}"
        self._label_width = max(
            self._label_width, len(label), len(f"{epochs}/{epochs}")
        )
        label_width = self._label_width
        groups = self._fitting_groups(
            width - label_width - 2 * COLUMN_WIDTH - len(STAR)
        )
        line = Text(label.rjust(label_width))
        for group in groups:
            line.append_text(group.values(row, best))
        rate = format_learning_rate(row["lr"]) if "lr" in row else ABSENT
        line.append(column(rate) + column(format_duration(seconds)), MUTED)
        if best:
            line.append(STAR, GOOD)
        return [*self._due_headings(label_width, groups), line]

    def _add_metrics(self, row: Row) -> None:
        for key in row:
            for phase in self._headings_of_phases:
                if key.startswith(f"{phase}/"):
                    name = key.removeprefix(f"{phase}/")
                    self._phases.setdefault(name, set()).add(phase)
                    break

    def _fitting_groups(self, room: int) -> list[_Group]:
        """The metrics that fit in `room` characters."""
        # A metric that does not fit is left out whole: half of its columns would be misread.
        groups = []
        for name, logged in self._phases.items():
            phases = {}
            for phase, heading in self._headings_of_phases.items():
                if phase in logged:
                    phases[phase] = heading
            group = _Group(name, phases)
            room -= group.width
            if group.phases and room >= 0:
                groups.append(group)
        return groups

    def _due_headings(self, label_width: int, groups: list[_Group]) -> list[Text]:
        """Two heading lines where the columns have changed or the last heading is far above; else nothing."""
        titles = " " * label_width
        subtitles = "epoch".rjust(label_width)
        for group in groups:
            titles += group.title()
            subtitles += group.subtitle()
        subtitles += column("lr") + column("time")
        headings = [Text(titles, MUTED), Text(subtitles, MUTED)]
        if headings == self._headings and self._lines_below < HEADING_EVERY:
            self._lines_below += 1
            return []
        blank = [Text()] if self._headings else []
        self._headings = headings
        self._lines_below = 1
        return blank + headings
