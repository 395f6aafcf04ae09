"""Commands on configs and runs.

python -m trainer check [CONFIG.yaml] [key=value …]     whether it would run here: the header, and one step in memory
python -m trainer evaluate RUN [key=value …]            the best model's validation numbers, computed afresh
python -m trainer compare RUN_A RUN_B                   whether two runs are the same, and where they part first
python -m trainer replay RUN --step K [key=value …]     step K again, on one process, and taken apart
python -m trainer explain [CONFIG.yaml] [key=value …]   one step taken apart, in memory; --json, --all
python -m trainer predict RUN PATH… [key=value …]        what it says of images, folders and globs; --json, --top K, and
                                                        --export onnx|torch, which writes RUN/best.onnx or best.pt2
python -m trainer sync RUN…                             send to W&B what it lacks of runs: offline ones, those cut off
python -m trainer sweep SWEEP.yaml [--check] [--parallel N] [--seed N] [key=value …]
                                                        a sweep without a server; the same command goes on with it
"""

from __future__ import annotations

import importlib
import sys

from trainer.errors import ConfigError, leave, nearest, report

COMMANDS = ("check", "evaluate", "compare", "replay", "explain", "predict", "sync", "sweep")


def main(arguments: list[str]) -> int:
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    try:
        name, *rest = arguments
        if name not in COMMANDS:
            raise ConfigError(name, f"no such command{nearest(name, COMMANDS)}; --help lists them")
        return int(importlib.import_module(f"trainer.commands.{name}").main(rest) or 0)
    except Exception as error:
        return report(error)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
