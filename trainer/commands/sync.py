"""Send to W&B what it lacks of runs that were offline, cut off, or ended while its server was away.

lockstep sync runs/digits runs/another
lockstep sync runs/digits-grid                all runs of a local sweep

Nothing is sent twice.
"""

from __future__ import annotations

from pathlib import Path

from trainer.commands.arguments import CommandParser


def main(arguments: list[str]) -> None:
    """Send what is missing of each run, and print what that was."""
    parser = CommandParser("sync", __doc__)
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="RUN",
        type=Path,
        help="the directory of a run, or of a local sweep: all its runs",
    )
    options = parser.parse(arguments)

    from trainer.reporting.wandb.sync import send_missing

    for path in options.paths:
        for run in _runs(path):
            print(f"{run}: {send_missing(run)}", flush=True)


def _runs(path: Path) -> list[Path]:
    """The path itself, or all runs below it if it is the directory of a local sweep."""
    if (path / "config.yaml").is_file():
        return [path]
    return sorted(config.parent for config in path.glob("*/config.yaml")) or [path]
