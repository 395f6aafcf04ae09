"""Reads a sweep's YAML, as `wandb sweep` takes it: method, metric, parameters, early stopping and command."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from trainer.components.directions import direction_of
from trainer.config.fields import show
from trainer.config.load import command_line
from trainer.config.yaml_file import parser_reason
from trainer.errors import ConfigError, nearest
from trainer.sweep.source_text import check_source
from trainer.sweep.space import Parameter, Values, read_number, read_parameters

KEYS = (
    *("name", "description", "project", "entity", "program", "method"),
    *("metric", "parameters", "early_terminate", "run_cap", "command"),
)
# W&B's word for the place of a trial's `key=value` in its command.
VALUES = "${args_no_hyphens}"
ENVIRONMENT_VARIABLE = re.compile(r"\$\{envvar:([A-Z0-9_]+)\}")


@dataclass(frozen=True)
class Hyperband:
    """Stop a trial at its `min_iter × eta^k`th value of the metric if it is not among the best 1/`eta` there."""

    min_iter: int
    eta: int


@dataclass(frozen=True)
class Sweep:
    """A sweep.

    `command` starts a trial and still holds `VALUES`; `arguments` is its part after the program. A trial that
    reaches `target` ends the sweep. `wandb` holds the overrides that make the runs one group of their project.
    """

    file: Path
    name: str
    program: str
    method: Literal["grid", "random", "bayes"]
    metric: str
    # None until `with_goal` has found what the file leaves out.
    goal: Literal["minimize", "maximize"] | None
    is_goal_given: bool
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

    def trial_command(
        self, shared: list[str], values: Values, final: list[str]
    ) -> list[str]:
        """The command of a trial: `shared` overrides, the trial's values, and `final` overrides above all."""
        overrides = [*self.wandb, *shared, *format_overrides(values), *final]
        index = self.command.index(VALUES)
        before, after = self.command[:index], self.command[index + 1 :]
        return [*before, *overrides, *after]

    def is_target_reached(self, value: float | None) -> bool:
        """True if a trial's value is as good as the target, after which no new trial starts."""
        if self.target is None or value is None:
            return False
        if self.goal == "maximize":
            return value >= self.target
        return value <= self.target


def format_overrides(values: Values) -> list[str]:
    """Values as `key=value`, in YAML's spelling."""
    return [f"{name}={show(value)}" for name, value in values.items()]


def read_sweep(file: Path) -> Sweep:
    """The sweep that a YAML file describes. Raises `ConfigError` with the key at fault and the nearest valid one."""
    try:
        text = file.read_text()
        tree = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(
            str(file), f"cannot read this sweep ({error.strerror})"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            str(file), f"is not valid YAML: {parser_reason(error)}"
        ) from None
    try:
        check_source(text)
        return _read_tree(file, tree)
    except ConfigError as error:
        raise ConfigError(error.key, f"{error.message} ({file})") from None


def _read_tree(file: Path, tree: Any) -> Sweep:
    _check_keys(file, tree)
    program = str(tree["program"])
    metric = _read_section("metric", tree["metric"], ("name", "goal", "target"))
    if not metric.get("name"):
        raise ConfigError("metric.name", "is missing")
    target = metric.get("target")
    name = str(tree.get("name") or file.stem)
    # The sweep's directory has its name.
    if "/" in name or name in (".", ".."):
        raise ConfigError("name", f'"{name}" cannot be the name of a directory')
    run_cap = tree.get("run_cap")
    early_terminate = tree.get("early_terminate")
    command = _read_command(tree["command"], program)
    arguments = command[command.index(program) + 1 :]
    sweep = Sweep(
        file=file,
        name=name,
        program=program,
        method=_read_choice("method", tree["method"], ("grid", "random", "bayes")),
        metric=str(metric["name"]),
        goal=_read_goal(metric),
        is_goal_given="goal" in metric,
        target=None if target is None else read_number("metric.target", target),
        parameters=read_parameters(tree["parameters"]),
        hyperband=None if early_terminate is None else _read_hyperband(early_terminate),
        run_cap=None if run_cap is None else _read_count("run_cap", run_cap),
        command=command,
        arguments=[word for word in arguments if word != VALUES],
        wandb=_wandb_overrides(name, tree),
    )
    _check_method(sweep)
    return sweep


def _read_goal(metric: Mapping[str, Any]) -> Any:
    if "goal" not in metric:
        direction = direction_of(str(metric["name"]))
        return None if direction is None else f"{direction}imize"
    return _read_choice("metric.goal", metric["goal"], ("minimize", "maximize"))


def _check_keys(file: Path, tree: Any) -> None:
    if not isinstance(tree, Mapping):
        raise ConfigError(str(file), "must hold method, metric, parameters and command")
    for unknown in tree:
        if unknown not in KEYS:
            raise ConfigError(
                str(unknown), f"no such key of a sweep{nearest(str(unknown), KEYS)}"
            )
    for name in ("program", "method", "metric", "parameters", "command"):
        if name not in tree:
            raise ConfigError(name, "is missing")


def _check_method(sweep: Sweep) -> None:
    """A grid needs an end, bayes needs bounds, and the two endless methods need a number of trials."""
    for parameter in sweep.parameters:
        if sweep.method == "grid":
            parameter.list_values()
        if sweep.method == "bayes" and "normal" in parameter.law:
            raise ConfigError(
                f"parameters.{parameter.name}",
                "bayes searches between bounds; give min and max",
            )
    if sweep.method != "grid" and sweep.run_cap is None:
        raise ConfigError(
            "run_cap", f"is missing: a {sweep.method} sweep has no end without one"
        )


def _wandb_overrides(name: str, tree: Mapping[str, Any]) -> list[str]:
    overrides = [f"wandb.group={show(name)}"]
    for key in ("project", "entity"):
        if tree.get(key) is not None:
            overrides.append(f"wandb.{key}={show(str(tree[key]))}")
    return overrides


def _read_hyperband(tree: Any) -> Hyperband:
    """W&B has two ways to describe the rungs: up from `min_iter`, or `s` times down from `max_iter`."""
    key = "early_terminate"
    # strict changes what W&B's server does. It is accepted because one YAML serves both.
    section = _read_section(
        key, tree, ("type", "min_iter", "max_iter", "s", "eta", "strict")
    )
    _read_choice(f"{key}.type", section.get("type"), ("hyperband",))
    eta = _read_count(f"{key}.eta", section.get("eta", 3))
    if eta < 2:
        raise ConfigError(f"{key}.eta", f"{eta} is less than 2, the least it may be")
    if "min_iter" in section:
        for other in ("max_iter", "s"):
            if other in section:
                raise ConfigError(f"{key}.{other}", "does nothing beside min_iter")
        return Hyperband(_read_count(f"{key}.min_iter", section["min_iter"]), eta)
    if "max_iter" not in section or "s" not in section:
        raise ConfigError(key, "needs min_iter, or max_iter and s")
    max_iter = _read_count(f"{key}.max_iter", section["max_iter"])
    divisions = _read_count(f"{key}.s", section["s"])
    return Hyperband(max(1, max_iter // eta**divisions), eta)


def _read_command(tree: Any, program: str) -> list[str]:
    """A trial's command with every `${…}` replaced but `VALUES`."""
    if not isinstance(tree, list) or VALUES not in tree or "${program}" not in tree:
        raise ConfigError(
            "command",
            f'must be a list with "${{program}}" and "{VALUES}": train.py takes key=value',
        )
    if tree.index(VALUES) < tree.index("${program}"):
        raise ConfigError(
            "command", f"{VALUES} comes after ${{program}}, which takes them"
        )
    words = {
        "${env}": "/usr/bin/env",
        "${interpreter}": sys.executable,
        "${program}": program,
        VALUES: VALUES,
    }
    command = []
    for item in tree:
        word = str(item)
        if word in words:
            command.append(words[word])
        elif word.startswith("${") and not ENVIRONMENT_VARIABLE.fullmatch(word):
            raise ConfigError(
                "command", f"{word} is not one of {', '.join(words)}, ${{envvar:NAME}}"
            )
        else:
            # Replaced here, so that a missing variable is an error before the first trial.
            command.append(ENVIRONMENT_VARIABLE.sub(_look_up_variable, word))
    return command


def _look_up_variable(match: re.Match[str]) -> str:
    name = match.group(1)
    if name not in os.environ:
        raise ConfigError("command", f"the environment has no {name}")
    return os.environ[name]


def _read_section(key: str, tree: Any, keys: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        raise ConfigError(
            key, f"must be a section of {', '.join(keys)}, not {show(tree)}"
        )
    for unknown in tree:
        if unknown not in keys:
            raise ConfigError(
                f"{key}.{unknown}", f"no such key{nearest(str(unknown), keys)}"
            )
    return dict(tree)


def _read_choice(key: str, value: Any, choices: tuple[str, ...]) -> Any:
    if value not in choices:
        raise ConfigError(
            key,
            f"{show(value)} is not one of {', '.join(choices)}{nearest(str(value), choices)}",
        )
    return value


def _read_count(key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(key, f"{show(value)} is not a whole number of at least 1")
    return value
