"""A sweep from W&B's YAML, run here without a server; `--check` only says whether its trials can run."""

from __future__ import annotations

from pathlib import Path

from trainer.commands.arguments import split, whole_number
from trainer.errors import ConfigError, LockstepError
from trainer.sweep.check import check
from trainer.sweep.description import read_sweep
from trainer.sweep.results import write_results
from trainer.sweep.runner import LocalSweep
from trainer.sweep.table import LiveTable


def main(arguments: list[str]) -> None:
    """`SWEEP.yaml [--check] [--parallel N] [--seed N] [key=value …]`; overrides hold for every trial."""
    given = split(arguments, options=("parallel", "seed"), flags=("check",))
    if len(given.paths) != 1:
        raise ConfigError("SWEEP", f"one sweep's YAML is needed, and {len(given.paths)} are given")
    sweep = read_sweep(Path(given.paths[0]))
    config = check(sweep, given.overrides)
    if "check" in given.options:
        print(f"{sweep.file}: every parameter exists and takes its values, and {sweep.metric} is logged")
        return
    numbers = {
        name: whole_number({"parallel": "1", "seed": "0", **given.options}, name) for name in ("parallel", "seed")
    }
    if numbers["parallel"] < 1:
        raise ConfigError("--parallel", "at least one trial runs at a time")
    directory = Path(config.run.dir) / sweep.name
    local = LocalSweep(sweep, directory, shared=given.overrides, **numbers)
    try:
        with LiveTable(sweep) as table:
            local.run(table.show)
    finally:
        write_results(sweep, local.study, directory)
    if local.trials and all(trial.state == "failed" for trial in local.trials):
        raise LockstepError("every trial of the sweep failed; the first one's reason is in the table above")
