"""Send to W&B, after a run has ended, what did not reach it while the run was training."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from trainer.config.schema import Config
from trainer.core.trust import refuse_foreign_settings
from trainer.reporting.jsonl import read_rows
from trainer.reporting.wandb.files import is_offline, sessions
from trainer.reporting.wandb.run import WandbRun
from trainer.storage.run_directory import lock, read_config

UPLOAD_TIMEOUT = 3600.0  # seconds for the files of one run


def send_missing(run: Path) -> str:
    """Send what W&B lacks of one run; returns what was sent, in words.

    Offline sessions are sent by `wandb sync`. It refuses a session that was cut off, and it would send twice a session
    that was online and got half through. From the first such session on, the missing rows come from `metrics.jsonl`,
    the figures and the best model from `figures/` and `best/`.
    """
    config = read_config(run)
    refuse_foreign_settings(run, config)
    if not sessions(run, unsent=False):
        return "has no W&B files"
    with lock(run):
        files = sessions(run, unsent=True)
        if not files:
            return "nothing is left to send"
        sent = _send_offline_sessions(files)
        parts = []
        if sent:
            parts.append(
                f"{sent} offline session" if sent == 1 else f"{sent} offline sessions"
            )
        if sent < len(files):
            run_id = files[-1].stem.removeprefix("run-")
            parts.append(f"{_complete(run, config, run_id)} rows of metrics.jsonl")
    return f"sent {' and '.join(parts)}"


def _send_offline_sessions(files: list[Path]) -> int:
    """Send sessions by `wandb sync`, in order, up to the first that it does not send; returns how many it sent."""
    for index, file in enumerate(files):
        if not is_offline(file):
            return index
        subprocess.run(
            # -P: a wandb.py in the working directory is not the client.
            [sys.executable, "-P", "-m", "wandb", "sync", str(file.parent)],
            capture_output=True,
            check=False,
        )
        # Its exit status does not tell whether it sent anything. The marker file that it leaves does.
        if file in sessions(file.parents[2], unsent=True):
            return index
    return len(files)


def _complete(run: Path, config: Config, run_id: str) -> int:
    """Resume the W&B run and send what the server lacks; returns the number of rows sent."""
    rows = read_rows(run / "metrics.jsonl")
    summary = run / "summary.json"
    wandb_run = WandbRun(
        replace(
            config.wandb, mode="online", strict=True, finish_timeout=UPLOAD_TIMEOUT
        ),
        run_name=config.run.name,
        directory=run,
        config={},
        run_id=run_id,
        note=print,
        # This process is not the run, so its machine and use of it are of no interest.
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )
    rows_sent = wandb_run.send_missing_rows(rows, len(rows))
    if not summary.exists():
        wandb_run.finish(status=1)
        return rows_sent
    figures = {}
    for path in sorted((run / "figures").glob("*.*")):
        if path.suffix in (".png", ".csv") and not wandb_run.has(
            f"figures/{path.stem}"
        ):
            figures[path.stem] = path
    wandb_run.finish(step=json.loads(summary.read_text())["steps"], figures=figures)
    return rows_sent
