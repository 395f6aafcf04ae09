"""The rounds' results as Markdown and as a chart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.peers.job import Workload
from benchmarks.peers.rounds import Array, Entry, Outcome

RAW = "raw"  # the adapter that all others are held against
MOST_DIFFERENCE = 1e-4  # between weights, in fractions of the largest one
HEADINGS = (
    "trainer",
    "lean",
    "half of the rounds",
    "CPU time",
    "as used",
    "half of the rounds",
    "CPU time",
    "reads",
    "weights",
)
NOTES = """\
Times of a step over the lean raw loop's in the same round, medians. *Lean*: nothing is shown, logged or kept that can
be turned off. *As used*: as the trainer's guide or its defaults have it, with its progress bar; each file of
`benchmarks/peers/adapters/` says what that is. *CPU time* is that of all ranks together. *Reads* are tensors' values
read by Python a step, lean and as used: on a GPU most would wait for it. Lockstep's are a check that it makes at once
on a CPU only, and of the host's own tensors. *Weights*: the largest difference from the raw loop's after the last step,
in fractions of the largest weight. Lockstep lets malloc keep freed memory, as its programs do on a CPU."""


@dataclass(frozen=True)
class Table:
    """What came of one workload."""

    workload: Workload
    outcomes: Mapping[Entry, Outcome]
    failures: Mapping[Entry, str]

    def quartiles(self, entry: Entry) -> Array:
        """Of the ratio to the raw loop, lean, round by round: `(3, 2)`, for wall and CPU time."""
        base = self.outcomes[Entry(RAW, False)].seconds
        return np.percentile(self.outcomes[entry].seconds / base, [25, 50, 75], axis=0)

    def difference(self, name: str) -> float:
        """The largest between a peer's weights and the raw loop's, in fractions of the largest weight."""
        base = self.outcomes[Entry(RAW, False)].weights
        differences = [
            float(np.abs(outcome.weights - base).max())
            for entry, outcome in self.outcomes.items()
            if entry.name == name
        ]
        return max(differences, default=0.0) / float(np.abs(base).max())


@dataclass
class Report:
    """All workloads. `titles` are the peers' names by adapter; `absent` says why one is not there."""

    machine: str
    titles: Mapping[str, str]
    versions: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)

    @property
    def exit_status(self) -> int:
        """1 if a peer is missing, failed, or ended with other weights than the raw loop."""
        for table in self.tables:
            names = {entry.name for entry in table.outcomes}
            others = [
                name for name in names if table.difference(name) > MOST_DIFFERENCE
            ]
            if others or table.failures:
                return 1
        return int(bool(self.absent))

    def head(self) -> str:
        used = ", ".join(
            f"{name} {version}"
            for name, version in sorted(self.versions.items())
            if name not in self.machine
        )
        lines = [
            "# A step beside other trainers",
            "",
            f"{self.machine}, {used}",
            "",
            NOTES,
        ]
        lines += [
            f"\nNot measured: {self.titles[name]}, {reason}"
            for name, reason in self.absent.items()
        ]
        return "\n".join(lines)

    def table(self, index: int) -> str:
        """Markdown of one workload."""
        table = self.tables[index]
        raw = table.outcomes[Entry(RAW, False)].seconds
        micros = 1e6 * float(np.median(raw[:, 0]))
        rows = [HEADINGS, ("---", *["--:"] * (len(HEADINGS) - 1))]
        rows += [self._row(table, name) for name in self.titles if _has(table, name)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"## {table.workload.name}", ""]
        lines += [
            f"{len(raw)} rounds of {table.workload.steps} steps. The raw loop, lean: {micros:,.0f} µs a step.",
            "",
        ]
        lines += [_line(row, widths) for row in rows]
        lines += [
            f"\nFailed: {self.titles[entry.name]}, {entry.mode}: {reason}"
            for entry, reason in table.failures.items()
        ]
        return "\n".join(lines)

    def _row(self, table: Table, name: str) -> tuple[str, ...]:
        cells = [self.titles[name]]
        reads = []
        for as_used in (False, True):
            entry = Entry(name, as_used)
            if entry not in table.outcomes:
                cells += ["failed", "", ""]
                continue
            low, middle, high = table.quartiles(entry)
            ranges = f"{low[0]:.2f} to {high[0]:.2f}"
            cells += [f"{middle[0]:.2f}", ranges, f"{middle[1]:.2f}"]
            reads.append(f"{table.outcomes[entry].reads:.3g}")
        difference = table.difference(name)
        weights = f"{difference:.0e}" if difference else "equal"
        if difference > MOST_DIFFERENCE:
            weights = f"**others**, {weights}"
        return (*cells, ", ".join(reads), weights)

    def save(self, path: Path) -> None:
        """Write the page, and a chart of the same name beside it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        chart = path.with_suffix(".png")
        tables = [self.table(index) for index in range(len(self.tables))]
        image = f"![Times of a step over the raw loop's]({chart.name})"
        path.write_text("\n\n".join([self.head(), image, *tables]) + "\n")
        self.draw(chart)

    def draw(self, path: Path) -> None:
        """A panel for each workload, a row for each peer: lean and as used, with half of the rounds as a bar."""
        from matplotlib.figure import Figure

        names = list(self.titles)
        figure = Figure(figsize=(4 * len(self.tables) + 2, 4), layout="constrained")
        axes = figure.subplots(1, len(self.tables), sharey=True, squeeze=False)[0]
        for panel, table in zip(axes, self.tables, strict=True):
            for as_used, color in ((False, "tab:blue"), (True, "tab:orange")):
                rows, ratios, bars = [], [], []
                for row, name in enumerate(names):
                    entry = Entry(name, as_used)
                    if entry in table.outcomes:
                        low, middle, high = table.quartiles(entry)[:, 0]
                        rows.append(row + (0.12 if as_used else -0.12))
                        ratios.append(middle)
                        bars.append((middle - low, high - middle))
                panel.errorbar(
                    ratios,
                    rows,
                    xerr=np.array(bars).T,
                    fmt="o",
                    color=color,
                    label="as used" if as_used else "lean",
                )
            panel.axvline(1, color="gray", linewidth=0.8)
            panel.set_title(table.workload.name, fontsize=10)
            panel.set_xlabel("time of a step, × raw loop")
        axes[0].set_yticks(range(len(names)), list(self.titles.values()))
        axes[0].invert_yaxis()
        axes[0].legend()
        figure.savefig(path, dpi=100)


def _has(table: Table, name: str) -> bool:
    return any(entry.name == name for entry in (*table.outcomes, *table.failures))


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    first, *rest = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
    return f"| {first} | {' | '.join(rest)} |"
