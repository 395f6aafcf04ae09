"""The report: rows as they come in, written to a Markdown and a JSON file after each."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.gpu.check import Answer, Check, Unanswered
from benchmarks.gpu.isolation import Failure

PASS = "pass"
FAIL = "FAIL"  # the answer is no
FAILED = "FAILED"  # there is no answer, but an error, a crash, or no end in time
MEASURED = "measured"
REHEARSED = (
    "rehearsed"  # measured on the CPU, on next to nothing: the figures mean nothing
)
OPEN = (
    "open"  # for a GPU to answer, or for a machine with a package that is missing here
)


@dataclass(frozen=True)
class Row:
    """What became of a check. `result` is one of the constants above."""

    name: str
    question: str
    is_correctness: bool
    result: str
    text: str
    values: dict[str, Any]
    seconds: float

    @property
    def breaks_promise(self) -> bool:
        """True if a check of correctness failed or could not be made."""
        return self.is_correctness and self.result in (FAIL, FAILED)


def row_of(check: Check, result: object, seconds: float, *, on_gpu: bool) -> Row:
    """The row of a check's answer, or of what it raised."""
    values: dict[str, Any] = {}
    match result:
        case Answer(text, values, passed):
            measured = MEASURED if on_gpu else REHEARSED
            outcome = {True: PASS, False: FAIL, None: measured}[passed]
        case Unanswered():
            outcome, text = OPEN, str(result)
        case Failure(reason):
            outcome, text = FAILED, reason
        case _:
            lines = str(result).strip().splitlines() or ["no message"]
            outcome, text = FAILED, f"{type(result).__name__}: {lines[0]}"
    return Row(
        check.name,
        check.question,
        check.is_correctness,
        outcome,
        text,
        values,
        round(seconds, 1),
    )


@dataclass
class Report:
    """The rows so far, what they were found on, and the files they are kept in; no file where `directory` is None."""

    machine: dict[str, Any]
    options: dict[str, Any]
    directory: Path | None
    rows: list[Row] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        return bool(self.options["device"] != "cpu")

    @property
    def stem(self) -> str:
        """Date, device and torch's version, as a file name."""
        device, torch = self.machine["device"], self.machine["torch"]
        kind = "gpu" if self.on_gpu else "rehearsal"
        name = f"{date.today()}-{kind}-{device}-torch-{torch.partition('+')[0]}"
        return re.sub(r"[^a-z0-9.-]+", "-", name.lower())

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        """Write both files. A run that is cut keeps what it has found."""
        if self.directory is None:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        content = {
            "machine": self.machine,
            "options": self.options,
            "summary": self.summary(),
            "checks": [asdict(row) for row in self.rows],
        }
        files = {"json": json.dumps(content, indent=2) + "\n", "md": self.markdown()}
        for ending, text in files.items():
            path = self.directory / f"{self.stem}.{ending}"
            partial_path = path.with_suffix(".partial")
            partial_path.write_text(text)
            partial_path.replace(path)

    def markdown(self) -> str:
        facts = ", ".join(
            f"{name} {value}" for name, value in self.machine.items() if value
        )
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        title = (
            f"What a GPU showed: {self.machine['device']}"
            if self.on_gpu
            else "A rehearsal without a GPU, whose figures mean nothing"
        )
        lines = [
            f"# {title}",
            "",
            f"`python -m benchmarks.gpu`, {date.today():%d %B %Y}: {options}. {facts}.",
            "",
            self.summary(),
        ]
        for title, is_correctness in (("Correctness", True), ("Figures", False)):
            lines += [
                "",
                f"## {title}",
                "",
                "| check | question | result | s |",
                "|---|---|---|--:|",
            ]
            lines += [
                f"| {row.name} | {row.question} | {_in_cell(row)} | {row.seconds:.0f} |"
                for row in self.rows
                if row.is_correctness == is_correctness
            ]
        return "\n".join(lines) + "\n"

    def summary(self) -> str:
        """How many rows of each result there are, in one line."""
        results = [row.result for row in self.rows]
        counts = [
            f"{results.count(result)} {result}"
            for result in (PASS, FAIL, FAILED, MEASURED, REHEARSED, OPEN)
            if result in results
        ]
        broken = [row.name for row in self.rows if row.breaks_promise]
        verdict = (
            f"not correct or not known to be: {', '.join(broken)}"
            if broken
            else "no check of correctness failed"
        )
        return f"{len(results)} checks: {', '.join(counts)}; {verdict}"


def _in_cell(row: Row) -> str:
    return f"**{row.result}**: {row.text}".replace("|", "\\|")
