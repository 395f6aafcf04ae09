"""Sections of a config: dataclasses that declare keys, and that check and convert the values they are given."""

from __future__ import annotations

import math
import os
import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import (
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import yaml

from trainer.config.secrets import remember_secrets, secrets_in
from trainer.config.trees import Tree, leaves_in
from trainer.config.yaml_dump import to_yaml
from trainer.errors import ConfigError, nearest

PLAIN_TYPES = (str, int, float, bool, type(None))
TYPE_NAMES = {
    int: "integer",
    float: "number",
    bool: "boolean (true or false)",
    str: "text",
    dict: "mapping",
    type(None): "null",
}


class Key(NamedTuple):
    """One key of a section: `hint` is its type, `minimum` the smallest number allowed, `infinite` whether .inf is.

    `path`: it names a file or a folder.
    """

    hint: Any
    default: Any
    meaning: str
    unit: str
    minimum: float | None
    infinite: bool
    path: bool


def key(
    default: Any,
    meaning: str,
    *,
    unit: str = "",
    minimum: float | None = None,
    infinite: bool = False,
    path: bool = False,
) -> Any:
    """Declare a key in the body of a section."""
    metadata = {
        "default": default,
        "meaning": meaning,
        "unit": unit,
        "minimum": minimum,
        "infinite": infinite,
        "path": path,
    }
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


class Section:
    """Base of all sections. A section is checked in its constructor, so YAML and Python meet the same checks.

    Numbers of numpy and torch become Python's, tuples become lists and paths become text: a config holds what
    YAML can write. Raises `ConfigError` naming the key.
    """

    SECTION: ClassVar[str]  # the section's name in a config

    def __post_init__(self) -> None:
        for name, item in declared_keys(type(self)).items():
            value = getattr(self, name)
            # Most values are defaults, and checking them would take most of the time.
            if value is not item.default:
                value = convert(f"{self.SECTION}.{name}", item, value)
                # Because the dataclasses are frozen.
                object.__setattr__(self, name, value)

    def to_dict(self) -> Tree:
        """Keys and values as they stand in YAML."""
        return dict(vars(self))


# Modules that have moved: a run that named their classes goes on under the new paths.
MOVED_MODULES = {
    "trainer.task.": "trainer.components.task.",
    "trainer.models.": "trainer.components.models.",
    "trainer.optimizer.": "trainer.components.optimizer.",
    "trainer.schedule.": "trainer.components.schedule.",
    # Tasks keep the path under which runs have named them.
    "trainer.components.classification.": "trainer.components.task.",
    "trainer.components.element_losses.": "trainer.components.task.",
}


def current_path(name: str) -> str:
    """An import path as it is today, from one that an earlier version may have written."""
    for old, new in MOVED_MODULES.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


@dataclass(frozen=True, kw_only=True)
class ComponentSection(Section):
    """A section that names a component. Keys that it does not declare are the component's arguments, `args`."""

    args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "name", current_path(getattr(self, "name", "")))
        if not isinstance(self.args, Mapping):
            raise ConfigError(
                f"{self.SECTION}.args",
                f"{show(self.args)} is not a mapping of arguments",
            )
        arguments = {}
        for name, value in self.args.items():
            key_name = f"{self.SECTION}.{name}"
            if name in declared_keys(type(self)):
                # In YAML both stand side by side, and one of the values would be lost.
                raise ConfigError(
                    key_name, "is a key of this section, so it cannot stand in args too"
                )
            arguments[str(name)] = to_plain(key_name, value)
        object.__setattr__(self, "args", arguments)
        remember_secrets(secrets_in(vars(self)))

    def to_dict(self) -> Tree:
        """Keys and values as they stand in YAML: a component's arguments beside the declared keys."""
        values = super().to_dict()
        values.update(values.pop("args"))
        return values


def read_section(cls: Any, tree: Any) -> Any:
    """The section `cls` that a mapping of keys describes."""
    if tree is None:
        return cls()
    if not isinstance(tree, Mapping):
        raise ConfigError(cls.SECTION, f"is a section of keys, not {show(tree)}")
    keys = declared_keys(cls)
    values: Tree = {}
    arguments: Tree = {}
    for name, value in tree.items():
        if name in keys:
            values[name] = value
        elif issubclass(cls, ComponentSection):
            arguments[name] = value
        else:
            hint = nearest(str(name), keys)
            raise ConfigError(f"{cls.SECTION}.{name}", f"no such key{hint}")
    if arguments:
        values["args"] = arguments
    return cls(**values)


def declared_keys(cls: Any) -> dict[str, Key]:
    """The keys that a section declares by `key`, by name."""
    # Resolving type hints takes longer than all checks of a config.
    if cls not in _declared_keys:
        keys = {}
        hints = get_type_hints(cls)
        for item in fields(cls):
            if item.metadata:
                keys[item.name] = Key(hints[item.name], **item.metadata)
        _declared_keys[cls] = keys
    return _declared_keys[cls]


_declared_keys: dict[Any, dict[str, Key]] = {}


def to_plain(name: str, value: Any) -> Any:
    """A copy of `value` made of what YAML can write: text, numbers, booleans, None, lists and mappings."""
    if type(value) is str:
        _check_text(name, value)
    if type(value) in PLAIN_TYPES:
        return value
    if isinstance(value, Mapping):
        copy = {}
        for inner, item in value.items():
            if type(inner) not in PLAIN_TYPES:
                raise ConfigError(
                    name,
                    f"{inner!r} is no key of a mapping that can be written to config.yaml",
                )
            copy[inner] = to_plain(name, item)
        return copy
    if isinstance(value, list | tuple):
        return [to_plain(name, item) for item in value]
    # A number or an array of numpy or torch, neither of which is imported here.
    if hasattr(value, "tolist"):
        return to_plain(name, value.tolist())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise ConfigError(
        name,
        f"{value!r} is a {type(value).__name__}, and a config holds only text, numbers, booleans, null, lists and "
        "mappings, so that it can be written to config.yaml",
    )


def _check_text(name: str, text: str) -> None:
    """Raise `ConfigError` for text that `config.yaml` cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(name, f"{text!a} is no text in UTF-8") from None


def convert(name: str, item: Key, value: Any) -> Any:
    """`value` as the key's type, and not below its minimum; a `ConfigError` otherwise."""
    value = _convert(name, item.hint, to_plain(name, value))
    if isinstance(value, str) and "\0" in value:
        # No path, and no name of anything.
        raise ConfigError(name, f"{value!a} holds a zero byte")
    if item.path and isinstance(value, str):
        refuse_empty_path(name, value)
    # Not `value < minimum`: NaN is below nothing, and must be refused.
    if (
        item.minimum is not None
        and isinstance(value, int | float)
        and not value >= item.minimum
    ):
        raise ConfigError(
            name,
            f"{show(value)} is less than {show(item.minimum)}, the least it may be",
        )
    if not item.infinite and not all(map(_is_finite, leaves_in(value))):
        raise ConfigError(name, f"{show(value)} is not finite")
    return value


def refuse_empty_path(name: str, path: str) -> None:
    """Raise `ConfigError` for text of nothing: it would be the working directory, and is mostly an unset variable."""
    if not path.strip():
        raise ConfigError(
            name,
            "is empty, and is to name a file or folder; leave it out for the default, and write . for the working "
            "directory",
        )


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _convert(name: str, hint: Any, value: Any) -> Any:
    """`value`, which is plain, as the type `hint`; never a silent change of meaning.

    An integer is also a number, and a number is also text. Text is never a number, and 1 is not true.
    """
    kind = type(value)
    origin = get_origin(hint)
    if is_union(hint):
        return _convert_to_any_of(name, get_args(hint), value)
    if origin is Literal:
        return _check_choice(name, get_args(hint), value)
    if origin is list and kind is list:
        (item_hint,) = get_args(hint)
        return [_convert(name, item_hint, item) for item in value]
    if origin is dict and kind is dict:
        return {str(inner): item for inner, item in value.items()}
    if hint in (kind, Any):
        return value
    if hint is float and kind is int:
        with suppress(OverflowError):  # of 10**400, say
            return float(value)
    # An infinity was mostly text, 12e4567, before something read it as a number.
    if hint is str and (kind is int or (kind is float and math.isfinite(value))):
        return str(value)
    raise ConfigError(name, f"{show(value)} is not {with_article(hint)}")


def _check_choice(name: str, choices: Sequence[str], value: Any) -> Any:
    if value in choices:
        return value
    hint = nearest(str(value), choices)
    raise ConfigError(name, f"{show(value)} is not one of {', '.join(choices)}{hint}")


def _convert_to_any_of(name: str, hints: Sequence[Any], value: Any) -> Any:
    """`value` as the first type of a union that takes it."""
    options = list(hints)
    if type(None) in options:
        options.remove(type(None))
        if value is None:
            return None
    if len(options) == 1:
        # Its own message says more than the one below.
        return _convert(name, options[0], value)
    for option in options:
        with suppress(ConfigError):
            return _convert(name, option, value)
    type_names = " or ".join(map(with_article, options))
    raise ConfigError(name, f"{show(value)} is not {type_names}")


def is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def type_name(hint: Any) -> str:
    """A type as `--help` and messages call it: `integer|null`, `list of numbers`."""
    origin = get_origin(hint)
    members = get_args(hint)
    if origin is Literal:
        return "|".join(members)
    if is_union(hint):
        return "|".join(type_name(member) for member in members)
    if origin is list:
        return f"list of {type_name(members[0])}s"
    return TYPE_NAMES[origin or hint]


def with_article(hint: Any) -> str:
    """`type_name` as a sentence needs it: `an integer`."""
    noun = type_name(hint)
    if hint is str or get_origin(hint) is Literal:
        return noun
    article = "an" if noun[0] in "aeio" else "a"
    return f"{article} {noun}"


def show(value: Any) -> str:
    """A value as YAML writes it, in one line; what YAML cannot write, as Python does."""
    try:
        return (
            to_yaml(value, default_flow_style=True, width=10_000)
            .removesuffix("...\n")
            .strip()
        )
    except yaml.YAMLError:
        return repr(value)
