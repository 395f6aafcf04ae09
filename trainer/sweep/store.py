"""What a sweep knows, in SQLite: it outlives a sweep that is killed, and the next one goes on from it."""

from __future__ import annotations

import fcntl
import json
import sqlite3
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from trainer.errors import ConfigError
from trainer.sweep.space import Values

State = Literal["running", "interrupted", "done", "stopped", "failed"]  # stopped: early; interrupted: to be run again

TABLES = """
CREATE TABLE IF NOT EXISTS sweep (made_of TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS trials (
    number INTEGER PRIMARY KEY, state TEXT NOT NULL, value REAL, reason TEXT NOT NULL, seconds REAL NOT NULL,
    "values" TEXT NOT NULL
);
"""


@dataclass
class Trial:
    """A trial. `value` is its best of the sweep's metric; `reason` why it failed; `seconds` how long it ran, in all."""

    number: int
    values: Values
    state: State = "running"
    value: float | None = None
    reason: str = ""
    seconds: float = 0.0
    curve: list[float] = field(default_factory=list)  # the metric as it was logged; kept in the run's own files


class Store:
    """`<directory>/sweep.sqlite`, held by this process. `made_of` is what may not change while trials are compared."""

    def __init__(self, directory: Path, made_of: dict[str, object]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / "sweep.sqlite"
        self._lock = (directory / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError("name", f"another sweep is running in {directory}; give this one another name") from None
        self._connection = sqlite3.connect(self._path)
        try:
            self._connection.executescript(TABLES)
            self._check(made_of)
            with self._connection:
                self._connection.execute("UPDATE trials SET state = 'interrupted' WHERE state = 'running'")
        except sqlite3.DatabaseError as error:
            raise ConfigError(
                str(self._path), f"cannot be used ({error}); move it away, or name this sweep otherwise"
            ) from None

    def _check(self, made_of: dict[str, object]) -> None:
        text = json.dumps(made_of, sort_keys=True)
        row = self._connection.execute("SELECT made_of FROM sweep").fetchone()
        if row is None:
            with self._connection:
                self._connection.execute("INSERT INTO sweep VALUES (?)", (text,))
        elif row[0] != text:
            before, now = json.loads(row[0]), json.loads(text)
            changed = ", ".join(name for name in now if now[name] != before.get(name))
            raise ConfigError(
                "name", f"this sweep differs from the one in {self._path} in: {changed}; name it otherwise"
            )

    def trials(self) -> list[Trial]:
        """All trials so far, by number."""
        query = 'SELECT number, "values", state, value, reason, seconds FROM trials ORDER BY number'
        with closing(self._connection.execute(query)) as rows:
            return [Trial(number, json.loads(values), *rest) for number, values, *rest in rows]

    def save(self, trial: Trial) -> None:
        row = (trial.number, trial.state, trial.value, trial.reason, trial.seconds, json.dumps(trial.values))
        with self._connection:
            self._connection.execute("INSERT OR REPLACE INTO trials VALUES (?, ?, ?, ?, ?, ?)", row)

    def close(self) -> None:
        self._connection.close()
        self._lock.close()
