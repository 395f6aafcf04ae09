"""Names in a config → the objects they stand for, built with the rest of their section."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from trainer.config.annotations import check_texts
from trainer.config.component_lists import ObserverConfig
from trainer.config.schema import keys_of
from trainer.config.secrets import redacted, redacted_output
from trainer.errors import ConfigError, LockstepError, config_error, nearest

T = TypeVar("T")


def resolve(section: str, name: str, short_names: Mapping[str, Any]) -> Any:
    """The object that `name` stands for: one of `short_names`, or an import path `package.module.Object`."""
    if name in short_names:
        return short_names[name]
    module_name, dot, attribute = name.rpartition(".")
    if not dot or not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(
            f"{section}.name",
            f'"{name}" is not one of {", ".join(short_names)}, nor an import path{nearest(name, short_names)}',
        )
    owner = _import_owner(section, name, module_name)
    if not hasattr(owner, attribute):
        message = (
            f'"{module_name}" has no "{attribute}"{nearest(attribute, dir(owner))}'
        )
        raise ConfigError(f"{section}.name", message)
    return getattr(owner, attribute)


def _import_owner(section: str, name: str, path: str) -> Any:
    """The module at `path`, or the class there: `package.module.Class.create` is a constructor too."""
    try:
        return importlib.import_module(path)
    except ImportError as error:
        module_name, _, class_name = path.rpartition(".")
        # Importing `module.Class` fails after `module` was imported; any other failure is the user's to see.
        if error.name == path and module_name in sys.modules:
            owner = getattr(sys.modules[module_name], class_name, None)
            if isinstance(owner, type):
                return owner
        raise ConfigError(
            f"{section}.name", f'cannot import "{path}" for "{name}": {error}'
        ) from None


def refuse_other_class(section: str, name: str, target: Any, base: type) -> None:
    """Raise `ConfigError` for a class whose objects are no `base`, before one is made: making it may do anything.

    What a function makes, or a class that makes objects of another, is checked when it is made.
    """
    if not isinstance(target, type) or issubclass(target, base):
        return
    if target.__new__ is object.__new__ and type(target).__call__ is type.__call__:
        raise ConfigError(
            f"{section}.name",
            f'"{name}" is a class, but not a subclass of {base.__name__}',
        )


def build(
    section: str,
    target: Callable[..., Any],
    arguments: Mapping[str, Any],
    *supplied: Any,
    **optional: Any,
) -> Any:
    """Call `target` with `supplied` by position and, by name, `optional` and the `arguments` that a config gives.

    An `optional` value is passed only to a target with a parameter of that name, so a component asks for what it needs
    by naming it. Raises `ConfigError`, with the key within `section`, for an argument that the target does not
    take, for one that it needs and did not get, and for what the target itself raises.
    """
    if not callable(target):
        raise ConfigError(
            f"{section}.name", f"stands for {target!r}, which cannot be called"
        )
    parameters = _named_parameters(target)
    if parameters is not None:
        for name in optional.keys() - parameters.keys():
            del optional[name]
        for name in list(parameters)[: len(supplied)]:
            del parameters[name]  # given by position already
        _check_arguments(section, target, parameters, arguments, optional)
        check_texts(section, target, arguments)
    try:
        # What the config says wins over what the trainer would supply.
        return target(*supplied, **(optional | dict(arguments)))
    except LockstepError:
        raise
    except Exception as error:
        # A component may raise anything for arguments it cannot use.
        reason = redacted_output(f"{type(error).__name__}: {error}")
        message = (
            f"{_name_of(target)} refused its arguments {redacted(arguments)}: {reason}"
        )
        raise config_error(section, message, error) from error


def build_observers(
    sections: Sequence[ObserverConfig],
    base: type[T],
    short_names: Mapping[str, Any] | None = None,
) -> list[T]:
    """Import and build the observers of a config, in order. Each must be an instance of `base`.

    Raises `ConfigError` naming the observer by its index, as in `observers[0].name`.
    """
    observers = []
    for index, section in enumerate(sections):
        place = f"observers[{index}]"
        target = resolve(place, section.name, short_names or {})
        refuse_other_class(place, section.name, target, base)
        observer = build(place, target, section.args)
        if not isinstance(observer, base):
            kind = type(observer).__name__
            raise ConfigError(
                f"{place}.name",
                f"{section.name} gives a {kind}, which is not a {base.__name__}",
            )
        observers.append(observer)
    return observers


def _check_arguments(
    section: str,
    target: Callable[..., Any],
    parameters: Mapping[str, inspect.Parameter],
    arguments: Mapping[str, Any],
    optional: Mapping[str, Any],
) -> None:
    """Check a config's `arguments` against the parameters of `target` that can be given by name."""
    for name in arguments:
        if name not in parameters:
            # An `optional` one may be overridden, but offering it would suggest that it is needed.
            choices = [choice for choice in parameters if choice not in optional]
            hint = nearest(name, [*choices, *keys_of(section)])
            raise ConfigError(
                f"{section}.{name}",
                f"{_name_of(target)} has no such argument{hint}; it takes {', '.join(choices) or 'none'}",
            )
    for name, parameter in parameters.items():
        required = parameter.default is parameter.empty
        if required and name not in arguments and name not in optional:
            raise ConfigError(
                f"{section}.{name}", f"{_name_of(target)} needs this argument"
            )


def _named_parameters(
    target: Callable[..., Any],
) -> dict[str, inspect.Parameter] | None:
    """The target's parameters, without `*args`; None if it takes any name, or does not say."""
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # some built-in callables have no signature
        return None
    by_name = {}
    for name, parameter in parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            return None
        if parameter.kind is not parameter.VAR_POSITIONAL:
            by_name[name] = parameter
    return by_name


def _name_of(target: Any) -> str:
    return getattr(target, "__name__", str(target))
