"""A sweep's YAML, as `wandb sweep` takes it: method, metric, parameters, early stopping, and a trial's command."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from trainer.config.fields import show
from trainer.config.load import command_line, parser_reason
from trainer.errors import ConfigError, nearest
from trainer.sweep.space import Parameter, Values, number, read_parameters

KEYS = (
    *("name", "description", "project", "entity", "program", "method"),
    *("metric", "parameters", "early_terminate", "run_cap", "command"),
)
VALUES = "${args_no_hyphens}"  # where a trial's `key=value` go
ENVIRONMENT = re.compile(r"\$\{envvar:([A-Z0-9_]+)\}")


@dataclass(frozen=True)
class Hyperband:
    """Stop a trial at its `least × rate^k`th value of the metric if it is not among the best 1/`rate` there."""

    least: int
    rate: int


@dataclass(frozen=True)
class Sweep:
    """A sweep. `command` is a trial's, with `VALUES` still in it; `arguments` are what follows the program in it.

    `target`, of the metric, ends the sweep. `wandb` are overrides that make its runs one group, where it wants them.
    """

    file: Path
    name: str
    program: str
    method: Literal["grid", "random", "bayes"]
    metric: str
    goal: Literal["minimize", "maximize"]
    target: float | None
    parameters: list[Parameter]
    hyperband: Hyperband | None
    run_cap: int | None
    command: list[str]
    arguments: list[str]
    wandb: list[str]

    def base(self) -> tuple[Path | None, list[str]]:
        """The config and overrides that all trials share."""
        return command_line(self.arguments)

    def trial_command(self, shared: list[str], values: Values, own: list[str]) -> list[str]:
        """What starts a trial: `shared` overrides, the trial's values, and its `own` overrides above all."""
        given = [*self.wandb, *shared, *(f"{name}={show(value)}" for name, value in values.items()), *own]
        place = self.command.index(VALUES)
        return [*self.command[:place], *given, *self.command[place + 1 :]]

    def has_reached(self, value: float) -> bool:
        """Whether a trial's value is as good as the target, after which there are no new trials."""
        if self.target is None:
            return False
        return value >= self.target if self.goal == "maximize" else value <= self.target


def read_sweep(file: Path) -> Sweep:
    """The sweep that a YAML file describes. Raises `ConfigError` with the key at fault and the nearest valid one."""
    try:
        tree = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ConfigError(str(file), f"cannot read this sweep ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(str(file), f"is not valid YAML: {parser_reason(error)}") from None
    try:
        return _sweep(file, tree)
    except ConfigError as error:
        raise ConfigError(error.key, f"{error.message} ({file})") from None


def _sweep(file: Path, tree: Any) -> Sweep:
    if not isinstance(tree, Mapping):
        raise ConfigError(str(file), "is to hold method, metric, parameters and command")
    for unknown in tree:
        if unknown not in KEYS:
            raise ConfigError(str(unknown), f"no such key of a sweep{nearest(str(unknown), KEYS)}")
    for name in ("program", "method", "metric", "parameters", "command"):
        if name not in tree:
            raise ConfigError(name, "is missing")
    metric = _section("metric", tree["metric"], ("name", "goal", "target"))
    if not metric.get("name"):
        raise ConfigError("metric.name", "is missing")
    name = str(tree.get("name") or file.stem)
    if "/" in name or name in (".", ".."):
        raise ConfigError("name", f'"{name}" is to name a directory')
    run_cap = _whole("run_cap", tree["run_cap"]) if tree.get("run_cap") is not None else None
    method = _one_of("method", tree["method"], ("grid", "random", "bayes"))
    command, arguments = _command(tree["command"], str(tree["program"]))
    parameters = read_parameters(tree["parameters"])
    _check_method(method, parameters, run_cap)
    return Sweep(
        file=file,
        name=name,
        program=str(tree["program"]),
        method=method,
        metric=str(metric["name"]),
        goal=_one_of("metric.goal", metric.get("goal", "minimize"), ("minimize", "maximize")),
        target=number("metric.target", metric["target"]) if metric.get("target") is not None else None,
        parameters=parameters,
        hyperband=_hyperband(tree["early_terminate"]) if tree.get("early_terminate") is not None else None,
        run_cap=run_cap,
        command=command,
        arguments=arguments,
        wandb=[f"wandb.group={show(name)}"]
        + [f"wandb.{key}={show(str(tree[key]))}" for key in ("project", "entity") if tree.get(key) is not None],
    )


def _check_method(method: str, parameters: list[Parameter], run_cap: int | None) -> None:
    """Each method needs something: a grid an end, a search bounds, both of the endless ones a number of trials."""
    for parameter in parameters:
        if method == "grid":
            parameter.grid()
        if method == "bayes" and "normal" in parameter.distribution:
            raise ConfigError(f"parameters.{parameter.name}", "bayes searches between bounds; give min and max")
    if method != "grid" and run_cap is None:
        raise ConfigError("run_cap", f"is missing: a {method} sweep has no end without one")


def _hyperband(tree: Any) -> Hyperband:
    """W&B's two ways to say it: from `min_iter` on, or `s` times down from `max_iter`."""
    keys = ("type", "min_iter", "max_iter", "s", "eta", "strict")
    given = _section("early_terminate", tree, keys)
    _one_of("early_terminate.type", given.get("type"), ("hyperband",))
    rate = _whole("early_terminate.eta", given.get("eta", 3))
    if rate < 2:
        raise ConfigError("early_terminate.eta", f"{rate} is less than 2, the least it may be")
    if "min_iter" in given:
        for other in {"max_iter", "s"} & set(given):
            raise ConfigError(f"early_terminate.{other}", "does nothing beside min_iter")
        return Hyperband(_whole("early_terminate.min_iter", given["min_iter"]), rate)
    if "max_iter" not in given or "s" not in given:
        raise ConfigError("early_terminate", "needs min_iter, or max_iter and s")
    most, halvings = (_whole(f"early_terminate.{name}", given[name]) for name in ("max_iter", "s"))
    return Hyperband(max(1, most // rate**halvings), rate)


def _command(tree: Any, program: str) -> tuple[list[str], list[str]]:
    """A trial's command with all but its values put in, and its arguments."""
    if not isinstance(tree, list) or VALUES not in tree or "${program}" not in tree:
        raise ConfigError("command", f'is a list with "${{program}}" and "{VALUES}" in it: train.py takes key=value')
    words = {"${env}": "/usr/bin/env", "${interpreter}": sys.executable, "${program}": program, VALUES: VALUES}
    if tree.index(VALUES) < tree.index("${program}"):
        raise ConfigError("command", f"{VALUES} comes after ${{program}}, which takes them")
    command = []
    for word in map(str, tree):
        if word.startswith("${") and word not in words and not ENVIRONMENT.fullmatch(word):
            raise ConfigError("command", f"{word} is not one of {', '.join(words)}, ${{envvar:NAME}}")
        for variable in ENVIRONMENT.findall(word):
            if variable not in os.environ:
                raise ConfigError("command", f"the environment has no {variable}")
        command.append(words.get(word) or ENVIRONMENT.sub(lambda found: os.environ[found.group(1)], word))
    after = command[tree.index("${program}") + 1 :]
    return command, [word for word in after if word != VALUES]


def _section(key: str, tree: Any, keys: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        raise ConfigError(key, f"is a section of {', '.join(keys)}, not {show(tree)}")
    for unknown in tree:
        if unknown not in keys:
            raise ConfigError(f"{key}.{unknown}", f"no such key{nearest(str(unknown), keys)}")
    return dict(tree)


def _one_of(key: str, value: Any, choices: tuple[str, ...]) -> Any:
    if value not in choices:
        raise ConfigError(key, f"{show(value)} is not one of {', '.join(choices)}{nearest(str(value), choices)}")
    return value


def _whole(key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(key, f"{show(value)} is not a whole number of at least 1")
    return value
