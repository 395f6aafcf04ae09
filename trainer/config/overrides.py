"""Overrides, `optimizer.lr=0.1` and `~optimizer.momentum`: read as changes to lay over a config."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import yaml

from trainer.config.base import Origins
from trainer.config.changes import UNSET, Changes
from trainer.config.interpolation import as_config_error
from trainer.config.trees import Tree, map_leaves
from trainer.config.yaml_file import parser_reason
from trainer.config.yaml_text import (
    is_text_key,
    keep_text,
    serialize,
    takes_list,
    typed_text,
)
from trainer.errors import ConfigError

# `section.key`, or with brackets in OmegaConf's way: `observers[0].name`.
OVERRIDE_NAME = re.compile(r"[^.\[\]]+(\.[^.\[\]]+|\[[^.\[\]]+\])*")
UNSET_NAME = re.compile(r"~[^.\[\]=/]+(\.[^.\[\]=/]+)*")
TOO_DEEP = "nests too deeply, or an anchor (&name) holds its own alias (*name)"

Overrides = Sequence[str] | Mapping[str, Any]


def is_unset(argument: str) -> bool:
    """True for `~section.key` as an argument of a command, and not for a path such as `~/a.yaml`."""
    return UNSET_NAME.fullmatch(argument) is not None


def override_keys(overrides: Overrides) -> list[str]:
    """The dotted keys whose values the overrides give. A list is one value; a mapping changes its own keys alone."""
    tree = read_overrides(overrides, {}).tree
    return [_bracketed(key) for key in _keys_of_values(tree, "")]


def _keys_of_values(tree: Tree, prefix: str) -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _keys_of_values(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def read_overrides(overrides: Overrides, origins: Origins) -> Changes:
    """The overrides as changes, interpolations still in them; where each was set is added to `origins`."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    # Objects are refused later, by key.
    tree: Any = OmegaConf.create({}, flags={"allow_objects": True})
    unset: dict[str, bool] = {}
    try:
        if isinstance(overrides, Mapping):
            for name, value in overrides.items():
                _add_item(tree, unset, str(name), value, origins)
            return Changes(cast(Tree, OmegaConf.to_container(tree)), unset)
        for override in overrides:
            _add_text(tree, unset, override, origins)
    except OmegaConfBaseException as error:
        raise as_config_error(error) from None
    changes: Tree = map_leaves(OmegaConf.to_container(tree), _none_to_null)
    return Changes(changes, unset)


def _add_item(
    tree: Any, unset: dict[str, bool], name: str, value: Any, origins: Origins
) -> None:
    """Add one item of a mapping of overrides."""
    from omegaconf import OmegaConf

    if is_unset(name) and value is None:
        _add_unset(tree, unset, name, "the overrides", origins)
        return
    _note_place(name, "the overrides", origins)
    with _fitting(name):
        OmegaConf.update(tree, _dotted(name), value)


def _add_text(
    tree: Any, unset: dict[str, bool], override: str, origins: Origins
) -> None:
    """Add what `key=value` or `~key` says."""
    if is_unset(override):
        _add_unset(tree, unset, override, "the command line", origins)
        return
    name, _, _ = override.partition("=")
    if is_unset(name):
        raise ConfigError(name, "unsets a key, and takes no value")
    _note_place(name, "the command line", origins)
    with _fitting(name):
        _set(tree, override)


def _note_place(name: str, place: str, origins: Origins) -> None:
    origins[name] = place
    origins[_bracketed(name)] = place  # as messages name items of a list


def _dotted(name: str) -> str:
    """`groups.0.lr` for `groups[0].lr`: whether that is a list is known once the file is."""
    return re.sub(r"\[([^\]]*)\]", r".\1", name)


def _bracketed(name: str) -> str:
    return re.sub(r"\.(\d+)(?=[.\[]|$)", r"[\1]", name)


def _add_unset(
    tree: Any, unset: dict[str, bool], name: str, place: str, origins: Origins
) -> None:
    """Unset a key, as if neither the file nor an earlier override had set it; a later one may set it again."""
    from omegaconf import OmegaConf

    key = name.removeprefix(UNSET)
    origins[key] = place
    parent, _, last = key.rpartition(".")
    mapping = OmegaConf.select(tree, parent) if parent else tree
    is_overridden = OmegaConf.is_dict(mapping) and last in mapping
    if is_overridden:
        del mapping[last]
    unset[key] = not is_overridden


@contextmanager
def _fitting(name: str) -> Iterator[None]:
    """A context that sets the key `name`: OmegaConf cannot set a key within a list, or an item that is not there."""
    try:
        yield
    except (ConfigError, yaml.YAMLError, UnicodeError):
        raise
    except RecursionError:
        raise ConfigError(name, TOO_DEEP) from None
    except (ValueError, TypeError, LookupError, AssertionError) as error:
        raise ConfigError(
            name, f"cannot be set beside the other overrides ({error})"
        ) from None


def _set(tree: Any, override: str) -> None:
    """Set what `key=value` says in an OmegaConf tree."""
    from omegaconf import OmegaConf

    name, equals, value = override.partition("=")
    if not equals or not OVERRIDE_NAME.fullmatch(name):
        raise ConfigError(
            override, "an override is written key=value, as in optimizer.lr=0.01"
        )
    text_name, path = _bracketed(name), _dotted(name)
    is_text = is_text_key(text_name)
    if is_text and not (takes_list(text_name) and value.startswith("[")):
        OmegaConf.update(tree, path, typed_text(value))
        return
    if " #" in value and value[0] not in "[{'\"":
        # Not a comment: whoever types a command comments nothing.
        OmegaConf.update(tree, path, value)
        return
    written = value
    try:
        document = yaml.compose(value, yaml.SafeLoader)
        if keep_text(document, text_name):
            assert document is not None
            written = serialize(document)
        tree.merge_with_dotlist([f"{path}={written}"])
    except UnicodeError:
        raise ConfigError(name, f"{value!a} is no text in UTF-8") from None
    except yaml.YAMLError as error:
        raise ConfigError(
            name, f"{value} is not valid YAML: {parser_reason(error)}"
        ) from None


def _none_to_null(value: Any) -> Any:
    # W&B's agent writes a sweep's null in Python's way.
    return None if value == "None" else value
