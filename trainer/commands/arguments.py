"""What the commands' arguments have in common: one-line errors, and `key=value` overrides in any place."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from trainer.config.load import DEFAULT_CONFIG, load
from trainer.config.overrides import is_unset
from trainer.config.schema import Config
from trainer.errors import ConfigError, nearest
from trainer.process.exit import end_on_closed_pipe


class CommandParser(argparse.ArgumentParser):
    """The parser of one command. Its help is the docstring of the command's module.

    A mistake raises `ConfigError`, and so becomes one line and exit status 2, as a mistake in a config does.
    """

    def __init__(self, command: str, description: str | None) -> None:
        super().__init__(
            prog=program_name(command),
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._is_path: Callable[[str], bool] | None = None

    def add_run(self) -> None:
        """Take `RUN`, the directory of a run."""
        self.add_argument(
            "run",
            metavar="RUN",
            type=Path,
            help="the directory of a run: <run.dir>/<run.name>",
        )

    def add_trust(self) -> None:
        """Take `--trust PACKAGE`, as often as wanted."""
        self.add_argument(
            "--trust",
            metavar="PACKAGE",
            action="append",
            default=[],
            help="a package that the config of a run made elsewhere may import; remembered for that run",
        )

    def add_config(self) -> None:
        """Take `[CONFIG.yaml] [key=value …]`, for `load_config`."""
        self.add_argument(
            "config",
            nargs="?",
            metavar="CONFIG.yaml",
            help=f"default: {DEFAULT_CONFIG}",
        )
        # A directory may be named like an override, optimizer.lr=0.1 say, but no directory is a config.
        self.add_overrides(
            "changes a key of the config; `train --help` lists the keys",
            is_path=os.path.isfile,
        )

    def add_overrides(
        self, description: str, *, is_path: Callable[[str], bool] = os.path.exists
    ) -> None:
        """Take `key=value …`. Call this after the other positional arguments.

        An argument with a "=" is a path, not an override, if `is_path(argument)`: a run may be named lr=0.1.
        """
        self.add_argument(
            "overrides", nargs="*", default=[], metavar="key=value", help=description
        )
        self._is_path = is_path

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The arguments by name; `overrides` holds the `key=value` ones. Raises `ConfigError`."""
        overrides = []
        others = []
        for argument in arguments:
            if self._is_override(argument):
                overrides.append(argument.removeprefix("--"))
                continue
            if argument.startswith("--"):
                # Argparse would report what is missing first.
                self._check_option(argument)
            others.append(argument)
        # Options and paths may alternate, as in `predict RUN --json PATH`, which parse_args() does not accept.
        options, surplus = self.parse_known_intermixed_args(others)
        if self._is_path is not None:
            # Paths after the last one that the command takes.
            surplus += options.overrides
            options.overrides = overrides
        if surplus:
            raise ConfigError(
                surplus[0],
                f"is one argument too many; {self.prog} --help lists what it takes",
            )
        return options

    def _is_override(self, argument: str) -> bool:
        """True for `key=value`, `--section.key=value` and `~section.key`, unless it is a path."""
        name, equals, _ = argument.partition("=")
        if self._is_path is None or not (equals or is_unset(argument)):
            return False
        if argument.startswith("--"):
            return "." in name  # else it is an option of the command, as in --step=7
        return not self._is_path(argument)

    def _check_option(self, argument: str) -> None:
        """Raise `ConfigError`, with the nearest option, if there is none of that name."""
        name = argument.partition("=")[0].removeprefix("--")
        options = []
        for action in self._actions:
            options += [option.removeprefix("--") for option in action.option_strings]
        if name not in options:
            hint = (
                "; a key of the config is set as section.key=value"
                if self._is_path is not None
                else ""
            )
            raise ConfigError(
                f"--{name}", f"no such option{nearest(name, options)}{hint}"
            )

    def error(self, message: str) -> NoReturn:
        """Raise what argparse found wrong, with the argument's name as the key."""
        name, _, reason = message.removeprefix("argument ").partition(": ")
        raise ConfigError(name, reason)

    def print_help(self, file: object = None) -> None:
        """Print the help to stdout."""
        end_on_closed_pipe()
        super().print_help()


def program_name(command: str) -> str:
    """What the user typed to start the command."""
    script = Path(sys.argv[0]).name
    if script == "train.py":
        return script
    return (
        f"python -m trainer {command}"
        if script == "__main__.py"
        else f"lockstep {command}"
    )


def load_config(options: argparse.Namespace) -> Config:
    """The config that `CommandParser.add_config` names, its overrides laid over it."""
    path = DEFAULT_CONFIG if options.config is None else Path(options.config)
    return load(path, options.overrides)


def whole_number(*, least: int) -> Callable[[str], int]:
    """For argparse's `type`: a whole number that is `least` or more."""

    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f'needs a whole number, {least} or more, and got "{text}"'
            )
        return int(text)

    return convert


def one_of(choices: Sequence[str]) -> Callable[[str], str]:
    """For argparse's `type`: one of some words. A misspelt one is answered by the nearest."""

    def convert(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(
                f'"{text}" is not one of {", ".join(choices)}{nearest(text, choices)}'
            )
        return text

    return convert
