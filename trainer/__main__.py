"""Commands on configs and runs.

python -m trainer evaluate RUN [key=value …]     the best model's validation numbers, computed afresh
python -m trainer sweep SWEEP.yaml [--check] [--parallel N] [--seed N] [key=value …]
                                                 a sweep without a server; the same command goes on with it
"""

from __future__ import annotations

import importlib
import sys

from trainer.errors import ConfigError, leave, nearest, report

COMMANDS = ("evaluate", "sweep")


def main(arguments: list[str]) -> int:
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    try:
        name, *rest = arguments
        if name not in COMMANDS:
            raise ConfigError(name, f"no such command{nearest(name, COMMANDS)}; --help lists them")
        importlib.import_module(f"trainer.commands.{name}").main(rest)
    except Exception as error:
        return report(error)
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
