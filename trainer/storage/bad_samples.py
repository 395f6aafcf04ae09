"""`bad_samples.txt`: the samples that a run leaves out, one a line. A checkpoint holds those that it knew of, too.

A sample is written down before it is left out, so a run that is killed and resumed leaves out the same ones from the
same steps on, whatever has become of their files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trainer.data.bad_samples import BadSample
from trainer.data.names import printable
from trainer.storage.files import write_text

FILE = "bad_samples.txt"
COLUMNS = ("step", "part", "id", "path", "reason")
HEADING = "# " + "\t".join(COLUMNS)


def write(directory: Path, samples: Iterable[BadSample]) -> None:
    """Replace the list in a run's directory, at once."""
    lines = [HEADING]
    for bad in samples:
        values = (bad.step, bad.part, bad.id, bad.path, bad.reason)
        lines.append("\t".join(_as_field(value) for value in values))
    write_text(directory / FILE, "\n".join(lines) + "\n")


def read(directory: Path) -> list[BadSample]:
    """What the list in a run's directory holds; nothing where there is none. Lines of another form are left out."""
    try:
        text = (directory / FILE).read_text(errors="replace")
    except FileNotFoundError:
        return []
    samples = []
    for line in text.splitlines():
        fields = line.split("\t")
        if line.startswith("#") or len(fields) != len(COLUMNS):
            continue
        step, part, sample_id, path, reason = fields
        if step.isdecimal() and sample_id.isdecimal():
            samples.append(BadSample(part, int(sample_id), path, reason, int(step)))
    return samples


def to_rows(samples: Iterable[BadSample]) -> list[list[Any]]:
    """As a checkpoint holds them."""
    return [list(bad) for bad in samples]


def from_rows(rows: Sequence[Sequence[Any]]) -> list[BadSample]:
    """The inverse of `to_rows`."""
    return [BadSample(*row) for row in rows]


def _as_field(value: object) -> str:
    """A value as text without tabs and line ends."""
    return printable(" ".join(str(value).split()))
