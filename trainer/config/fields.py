"""Dataclasses whose fields are a config's keys, and plain values → such a dataclass, checked and converted."""

from __future__ import annotations

import types
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, field, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from trainer.errors import ConfigError, nearest


def key(default: Any, meaning: str, *, unit: str = "", least: float | None = None) -> Any:
    """Declare a key: its default, what it means, its unit, and the least value it may have."""
    metadata = {"meaning": meaning, "unit": unit, "least": least}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def component_arguments() -> Any:
    """Declare where a section keeps the arguments of the component it names."""
    return field(default_factory=dict, metadata={"arguments": True})


def read_section(cls: Any, prefix: str, tree: Any) -> Any:
    """The dataclass `cls` of the mapping `tree`, whose keys stand under `prefix` in the config."""
    if tree is None:
        tree = {}
    if not isinstance(tree, Mapping):
        raise ConfigError(prefix, f"is a section of keys, not {show(tree)}")
    hints = get_type_hints(cls)
    declared = {f.name: f for f in fields(cls) if "arguments" not in f.metadata}
    values: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    for raw, value in tree.items():
        name = str(raw)
        if name in declared:
            values[name] = _convert(f"{prefix}.{name}", hints[name], value)
            _check_least(f"{prefix}.{name}", values[name], declared[name].metadata["least"])
        elif "args" in hints:
            arguments[name] = value
        else:
            raise ConfigError(f"{prefix}.{name}", f"no such key{nearest(name, declared)}")
    return cls(**values, **({"args": arguments} if "args" in hints else {}))


def _check_least(name: str, value: Any, least: float | None) -> None:
    if least is not None and isinstance(value, int | float) and not value >= least:
        raise ConfigError(name, f"{value} is less than {show(least)}, the least it may be")


def _convert(name: str, hint: Any, value: Any) -> Any:
    """`value` as the type that `hint` names, or a `ConfigError`; never a silent change of meaning."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        if len(options) == 1:
            return _convert(name, options[0], value)
        for option in options:
            with suppress(ConfigError):
                return _convert(name, option, value)
        raise ConfigError(name, f"{show(value)} is not {' or '.join(type_name(a, article=True) for a in options)}")
    if origin is Literal:
        if value in args:
            return value
        raise ConfigError(name, f"{show(value)} is not one of {', '.join(args)}{nearest(str(value), args)}")
    if origin is list and isinstance(value, list):
        return [_convert(name, args[0], item) for item in value]
    if origin is dict and isinstance(value, Mapping):
        return {str(k): v for k, v in value.items()}
    if hint is Any or (isinstance(hint, type) and not isinstance(value, bool) and isinstance(value, hint)):
        return value
    if hint is bool and isinstance(value, bool):
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise ConfigError(name, f"{show(value)} is not {type_name(hint, article=True)}")


def type_name(hint: Any, *, article: bool = False) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "|".join(args)
    if origin in (Union, types.UnionType):
        return "|".join("null" if a is type(None) else type_name(a) for a in args)
    names = {
        int: "integer",
        float: "number",
        bool: "boolean (true or false)",
        str: "text",
        list: "list",
        dict: "mapping",
    }
    name = names.get(origin or hint, str(hint))
    if origin is list:
        name = f"list of {type_name(args[0])}s"
    if not article or name == "text":
        return name
    return f"an {name}" if name[0] in "aeio" else f"a {name}"


def show(value: Any) -> str:
    """A value as YAML writes it."""
    if is_dataclass(value):
        value = asdict(value)  # type: ignore[arg-type]
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
