"""Did the trials of a sweep read the same data? If not, their values cannot be compared."""

from __future__ import annotations

from pathlib import Path

from trainer.storage.data_record import read_record
from trainer.sweep.description import Sweep


def describe_other_data(sweep: Sweep, directory: Path) -> str:
    """One line that names the trials whose data are not those of the first; "" where a sweep varies them itself."""
    if any(parameter.name.startswith("data.") for parameter in sweep.parameters):
        return ""
    first: tuple[str, object] | None = None
    others = []
    for run in sorted(directory.glob(f"{sweep.name}-*/")):
        record = read_record(run)
        if record is None:
            continue
        data = (record.classes, record.train, record.evaluated())
        if first is None:
            first = run.name, data
        elif data != first[1]:
            others.append(run.name)
    if first is None or not others:
        return ""
    return (
        f"the data changed between trials, so their values do not compare: those of {', '.join(others)} are not those "
        f"of {first[0]}"
    )
