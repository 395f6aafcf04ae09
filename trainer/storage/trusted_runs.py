"""Which run directories were made here, and which were trusted later: a small file for each, in the user's own state.

    $XDG_STATE_HOME/lockstep/runs/<hash of the path>.json      (~/.local/state, where the variable is not set)

A record holds the directory's resolved path and the SHA-256 of each config written to it. So a copy of a directory, or
one whose config was changed, is not the one that was made here.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from trainer.storage.files import write_json

STATE_VARIABLE = "XDG_STATE_HOME"
# Of one directory: each resumed session may have another config, and best/ an older one.
MOST_CONFIGS = 100


class Trust(NamedTuple):
    """Whether a config was written by a run here, and the packages that the user named for it by `--trust`."""

    made_here: bool
    packages: frozenset[str]


UNKNOWN = Trust(made_here=False, packages=frozenset())


def trust_in(run: Path, config: bytes) -> Trust:
    """What is known of the config file with these contents in the directory `run`."""
    record = _read(run)
    sha256 = _sha256(config)
    packages = record["trusted"].get(sha256, [])
    return Trust(sha256 in record["made"], frozenset(packages))


def remember_made(run: Path, config: bytes) -> None:
    """Note that a run here wrote this config. Where there is no place to note it, `--trust` is needed later."""
    record = _read(run)
    sha256 = _sha256(config)
    if sha256 not in record["made"]:
        record["made"] = [*record["made"], sha256][-MOST_CONFIGS:]
        _write(run, record)


def remember_trusted(run: Path, config: bytes, packages: Iterable[str]) -> None:
    """Note the packages that a config may import from now on."""
    record = _read(run)
    sha256 = _sha256(config)
    names = sorted({*packages, *record["trusted"].get(sha256, [])})
    if record["trusted"].get(sha256) != names:
        record["trusted"][sha256] = names
        _write(run, record)


def remember_move(before: Path, now: Path) -> None:
    """Take along what is known of a directory that was renamed; `before` is its resolved path before that."""
    if before == now.resolve():
        return  # a link was renamed, not what it leads to
    record = _read(before)
    if record["made"] or record["trusted"]:
        _write(now, record)
    with suppress(OSError, RuntimeError):
        _record_path(before).unlink(missing_ok=True)


def _read(run: Path) -> dict[str, Any]:
    """The record of a directory; an empty one where there is none, or it cannot be read."""
    with suppress(OSError, RuntimeError, ValueError, KeyError, TypeError):
        record = json.loads(_record_path(run).read_text())
        if record["path"] == str(run.resolve()):
            return {"made": list(record["made"]), "trusted": dict(record["trusted"])}
    return {"made": [], "trusted": {}}


def _write(run: Path, record: dict[str, Any]) -> None:
    # Whatever keeps it from being written, a run is not to fail by it.
    with suppress(OSError, RuntimeError):
        path = _record_path(run)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(path, {"path": str(run.resolve()), **record})


def _record_path(run: Path) -> Path:
    """Raises `RuntimeError` where the user has no home."""
    name = _sha256(os.fsencode(run.resolve()))
    return _state_directory() / "lockstep" / "runs" / f"{name}.json"


def _state_directory() -> Path:
    # A relative path is to be ignored, by the specification of the variable.
    configured = os.environ.get(STATE_VARIABLE, "")
    if Path(configured).is_absolute():
        return Path(configured)
    return Path.home() / ".local" / "state"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
