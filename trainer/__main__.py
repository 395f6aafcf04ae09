"""Lockstep: the same training run on one GPU or many.

lockstep COMMAND …               `python -m trainer COMMAND …` is the same, also where the package is not installed
lockstep COMMAND --help          what a command takes, with examples
lockstep --help optimizer.adamw  the keys of a section, or the arguments of a component
torchrun --nproc_per_node 2 -m trainer COMMAND …      on several processes: train, check and evaluate
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import NoReturn

from trainer.config.secrets import remember_argument_secrets
from trainer.errors import ConfigError, nearest
from trainer.process.command import begin_command
from trainer.process.exit import (
    end_on_closed_pipe,
    exit_process,
    report_error,
    report_interrupt,
)
from trainer.process.launcher import quiet_torch

COMMANDS = (
    "train",
    "check",
    "profile",
    "evaluate",
    "predict",
    "replay",
    "explain",
    "compare",
    "cache",
    "sweep",
    "sync",
)


def main(arguments: list[str]) -> int:
    """Run one command; returns the exit status."""
    remember_argument_secrets(arguments)
    quiet_torch()
    command, *rest = arguments or ["--help"]
    if command in ("-h", "--help"):
        if rest:
            return int(import_module("trainer.commands.train").print_topics(rest))
        print_help()
        return 0
    try:
        return _run_command(command, rest)
    except KeyboardInterrupt:
        return report_interrupt()


def _run_command(command: str, arguments: list[str]) -> int:
    try:
        if command not in COMMANDS:
            raise ConfigError(
                command,
                f"no such command{nearest(command, COMMANDS)}; --help lists them",
            )
        return int(import_module(f"trainer.commands.{command}").main(arguments) or 0)
    except Exception as error:
        return report_error(error)


def print_help() -> None:
    """Print how to start a command, and the first line of each command's own help."""
    end_on_closed_pipe()
    print(f"{__doc__}\ncommands:")
    for command in COMMANDS:
        description = import_module(f"trainer.commands.{command}").__doc__ or ""
        print(f"  {command:<10}{description.splitlines()[0]}")


def run() -> NoReturn:
    """The installed command `lockstep`."""
    begin_command()
    exit_process(main(sys.argv[1:]))


if __name__ == "__main__":
    run()
