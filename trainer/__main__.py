"""Commands on finished runs.

python -m trainer evaluate RUN [key=value …]     the best model's validation numbers, computed afresh
"""

from __future__ import annotations

import sys
from pathlib import Path

from trainer.errors import ConfigError, leave, nearest, report
from trainer.run_directory import read_config
from trainer.trainer import Trainer


def evaluate(arguments: list[str]) -> None:
    """Load the best model of a run and print its validation numbers, on any number of processes."""
    run, overrides = _run_and_overrides(arguments)
    trainer = Trainer(read_config(run, overrides))
    kept = trainer.load_best(run)
    metrics = trainer.evaluator.evaluate() if trainer.evaluator else {}
    trainer.ranks.close()
    if trainer.ranks.is_main:
        print(f"{run}: best model, of epoch {kept['epoch']} (step {kept['step']})")
        for name, value in metrics.items():
            print(f"  val/{name}  {value:.6f}  (kept with {kept.get(f'val/{name}', float('nan')):.6f})")


COMMANDS = {"evaluate": evaluate}


def _run_and_overrides(arguments: list[str]) -> tuple[Path, list[str]]:
    paths = [argument for argument in arguments if "=" not in argument]
    if len(paths) != 1:
        raise ConfigError("RUN", f"one run directory is needed, and {len(paths)} are given")
    return Path(paths[0]), [argument for argument in arguments if "=" in argument]


def main(arguments: list[str]) -> int:
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    try:
        if arguments[0] not in COMMANDS:
            raise ConfigError(arguments[0], f"no such command{nearest(arguments[0], COMMANDS)}")
        COMMANDS[arguments[0]](arguments[1:])
    except Exception as error:
        return report(error)
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
