"""What W&B lacks of runs that were offline, cut off, or ended while its server was away."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from trainer.commands.arguments import split
from trainer.config.schema import Config
from trainer.errors import ConfigError
from trainer.reporting.jsonl import read_rows
from trainer.reporting.wandb.files import is_offline, sessions
from trainer.reporting.wandb.run import WandbRun
from trainer.storage.run_directory import lock, read_config

PATIENCE = 3600.0  # seconds for one run's files


def main(arguments: list[str]) -> None:
    """Send what is left of each run directory, or of every run of a local sweep's directory, and say what that was."""
    given = [Path(path) for path in split(arguments).paths]
    if not given:
        raise ConfigError("RUN", "at least one run directory is needed")
    for run in itertools.chain.from_iterable(map(_runs, given)):
        print(f"{run}: {sync(run)}", flush=True)


def _runs(path: Path) -> list[Path]:
    """The runs in a local sweep's directory; else the path itself."""
    if not (path / "sweep.sqlite").is_file():
        return [path]
    return sorted(config.parent for config in path.glob("*/config.yaml"))


def sync(run: Path) -> str:
    """Send what is left of one run; returns what was sent.

    Offline sessions go by `wandb sync`, which refuses one that was cut off, and would send one twice that was online
    and got half through. From such a one on, what is missing comes from `metrics.jsonl`, `figures/` and `best/`.
    """
    config = read_config(run)
    if not sessions(run, unsent=False):
        return "has no W&B files"
    with lock(run):
        files = sessions(run, unsent=True)
        if not files:
            return "nothing is left to send"
        whole = list(itertools.takewhile(lambda file: is_offline(file) and _send_offline(file), files))
        done = [f"{len(whole)} offline session{'s' * (len(whole) > 1)}"] if whole else []
        if len(files) > len(whole):
            done.append(f"{_complete(run, config, files[-1].stem.removeprefix('run-'))} rows of metrics.jsonl")
    return f"sent {' and '.join(done)}"


def _send_offline(file: Path) -> bool:
    """Whether `wandb sync` sent the session, which it says by a mark, not by its exit status."""
    subprocess.run([sys.executable, "-m", "wandb", "sync", str(file.parent)], capture_output=True, check=False)
    return file not in sessions(file.parents[2], unsent=True)


def _complete(run: Path, config: Config, run_id: str) -> int:
    """Go on with the run online, send what the server lacks, and return how many rows that was."""
    rows = read_rows(run / "metrics.jsonl")
    ended = run / "summary.json"
    going_on = WandbRun(
        replace(config.wandb, mode="online", strict=True, finish_timeout=PATIENCE),
        run_name=config.run.name,
        directory=run,
        config={},
        run_id=run_id,
        note=print,
        x_disable_meta=True,  # this process is not the run
        x_disable_stats=True,
        x_save_requirements=False,
    )
    missing = going_on.send_missing_rows(rows, len(rows))
    if not ended.exists():
        going_on.finish(status=1)
        return missing
    drawn = {path.stem: path for path in sorted((run / "figures").glob("*.*")) if path.suffix in (".png", ".csv")}
    lacking = {name: path for name, path in drawn.items() if not going_on.has(f"figures/{name}")}
    going_on.finish(step=json.loads(ended.read_text())["steps"], figures=lacking)
    return missing
