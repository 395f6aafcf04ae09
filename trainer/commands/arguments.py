"""A command's arguments: paths, `--option`s and `key=value` overrides, in any order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trainer.config.load import DEFAULT_CONFIG, load
from trainer.config.schema import Config
from trainer.errors import ConfigError, nearest


@dataclass(frozen=True)
class Arguments:
    """`options` holds the value of each `--option`; of a flag, "true"."""

    paths: list[str]
    options: dict[str, str]
    overrides: list[str]


def split(arguments: list[str], *, options: tuple[str, ...] = (), flags: tuple[str, ...] = ()) -> Arguments:
    """Sort `arguments`; `options` take a value (`--step 7` or `--step=7`), `flags` none."""
    found = Arguments([], {}, [])
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or (equals and "." in name):  # --optimizer.lr=1 is an override too
            is_path = not equals or Path(argument).exists()  # a folder may be named lr=0.1
            (found.paths if is_path else found.overrides).append(argument.removeprefix("--"))
            continue
        if name in flags and not equals:
            found.options[name] = "true"
        elif name in options and (equals or waiting):
            found.options[name] = value if equals else waiting.pop(0)
        elif name in options:
            raise ConfigError(argument, "needs a value")
        else:
            raise ConfigError(argument, f"no such option{nearest(name, [*options, *flags])}")
    return found


def the_run(paths: list[str]) -> Path:
    """The one run directory that a command is about."""
    if len(paths) != 1:
        raise ConfigError("RUN", f"one run directory is needed, and {len(paths)} are given")
    return Path(paths[0])


def the_config(given: Arguments) -> Config:
    """The config that a command is about; without a path the default one."""
    if len(given.paths) > 1:
        raise ConfigError(given.paths[1], f"one config at a time, and {given.paths[0]} is given already")
    return load(Path(given.paths[0]) if given.paths else DEFAULT_CONFIG, given.overrides)


def whole_number(options: dict[str, str], name: str) -> int:
    """The value of `--name`, a whole number that must be given."""
    if not options.get(name, "").isdecimal():
        raise ConfigError(f"--{name}", f'needs a whole number, and got "{options.get(name, "")}"')
    return int(options[name])
