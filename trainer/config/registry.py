"""Names in a config → the objects they stand for, built with the rest of their section."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

from trainer.config.schema import section_keys
from trainer.errors import ConfigError, LockstepError, nearest


def resolve(section: str, name: str, known: Mapping[str, Any]) -> Any:
    """The object that `name` names: one of the short names `known`, or an import path `package.module.Object`."""
    if name in known:
        return known[name]
    module_name, dot, attribute = name.rpartition(".")
    if not dot:
        raise ConfigError(
            f"{section}.name",
            f'"{name}" is not one of {", ".join(known)}, nor an import path{nearest(name, known)}',
        )
    holder = _imported(section, name, module_name)
    try:
        return getattr(holder, attribute)
    except AttributeError:
        raise ConfigError(
            f"{section}.name", f'"{module_name}" has no "{attribute}"{nearest(attribute, dir(holder))}'
        ) from None


def _imported(section: str, name: str, module_name: str) -> Any:
    """The module, or the class of a module, called `module_name`: a class method is a constructor too."""
    try:
        return importlib.import_module(module_name)
    except ImportError as error:
        outer, _, attribute = module_name.rpartition(".")
        if getattr(error, "name", None) == module_name and outer in sys.modules:
            holder = getattr(sys.modules[outer], attribute, None)
            if isinstance(holder, type):
                return holder
        raise ConfigError(f"{section}.name", f'cannot import "{module_name}" for "{name}": {error}') from None


def build(section: str, target: Callable[..., Any], arguments: Mapping[str, Any], *supplied: Any, **more: Any) -> Any:
    """`target(*supplied, **more, **arguments)`, where `arguments` are the user's keys of `section`.

    Of `more`, what the target does not take is left out, so that a component asks for what it needs by naming
    it. A key that the target does not take, one that it lacks, and its own complaint are `ConfigError`s.
    """
    parameters = _parameters(target)
    if parameters is not None:
        more = {k: v for k, v in more.items() if k in parameters}
        taken = list(parameters)[: len(supplied)]
        for name in arguments:
            if name not in parameters or name in taken:
                choices = [p for p in parameters if p not in taken and p not in more]
                raise ConfigError(
                    f"{section}.{name}",
                    f"{_name(target)} has no such argument{nearest(name, [*choices, *section_keys(section)])}; "
                    f"it takes {', '.join(choices) or 'none'}",
                )
        given = {*taken, *more, *arguments}
        for name, parameter in parameters.items():
            if parameter.default is parameter.empty and name not in given:
                raise ConfigError(f"{section}.{name}", f"{_name(target)} needs this argument")
    try:
        return target(*supplied, **{**more, **arguments})
    except LockstepError:
        raise
    except Exception as error:  # whatever a component makes of arguments it cannot use
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(section, f"{_name(target)} refused its arguments {dict(arguments)}: {reason}") from error


def _parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter] | None:
    """The target's named parameters; None where it takes any."""
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # some built-in callables have no signature
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    return {name: p for name, p in parameters.items() if p.kind is not p.VAR_POSITIONAL}


def _name(target: Any) -> str:
    return getattr(target, "__name__", str(target))
