"""Read a config: a YAML file with `key=value` overrides laid over it. And the text of `--help`.

Errors name the key, where it was set (file and line, or the command line), and the nearest valid name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import yaml

from trainer.config.fields import ComponentSection, declared_keys, show, type_name
from trainer.config.interpolation import as_config_error
from trainer.config.schema import SECTIONS, Config
from trainer.config.switch import replace_components
from trainer.config.trees import Tree, map_leaves
from trainer.config.yaml_text import (
    is_text_key,
    keep_text,
    serialize,
    takes_list,
    typed_text,
)
from trainer.errors import ConfigError, config_error, nearest

DEFAULT_CONFIG = Path("configs/digits.yaml")
# A pip-installed package brings its own configs/ with it.
PACKAGE = Path(__file__).parents[1]

OBSERVERS_HELP = """

observers
  observers=[]  (list of mappings)
      called in every step, in this order: [{name: my_package.MyObserver, argument: value}]"""

# `section.key`, or with brackets in OmegaConf's way: `observers[0].name`.
OVERRIDE_NAME = re.compile(r"[^.\[\]]+(\.[^.\[\]]+|\[[^.\[\]]+\])*")
TOO_DEEP = "nests too deeply, or an anchor (&name) holds its own alias (*name)"

Overrides = Sequence[str] | Mapping[str, Any]
# Where each key was set: the file and line, or the command line.
Origins = dict[str, str]


def load(
    path: str | os.PathLike[str] | None = None, overrides: Overrides = ()
) -> Config:
    """Read the YAML file at `path` (without one: the defaults), lay overrides over it and check everything.

    A path within `configs/` that does not exist is looked for among the configs that come with the package.
    Overrides are texts, `["optimizer.lr=0.1"]`, or a mapping of dotted keys to values, `{"optimizer.lr": 0.1}`. The
    value of a text is the text as typed where the key is text, and YAML elsewhere; `None` is null too, as W&B's agent
    writes it. Values may use OmegaConf's interpolations, `${oc.env:NAME}` for example. An override that names another
    component than the file drops the file's arguments of the old one (`Config.notes` says which).

    Raises `ConfigError` with the key, where it was set and the nearest valid one; `TypeError` for anything else than a
    path and overrides.
    """
    _check_types(path, overrides)
    origins: Origins = {}
    tree: Tree = {}
    try:
        if path is not None:
            tree = _read_file(find_config(path), origins)
        changes = _read_overrides(overrides, origins)
        notes = replace_components(tree, changes)
        config = Config.from_dict(_lay_over(tree, changes))
        return replace(config, notes=tuple(notes))
    except ConfigError as error:
        raise _with_origin(error, origins) from None
    except RecursionError:
        raise ConfigError("config" if path is None else str(path), TOO_DEEP) from None


def find_config(path: str | os.PathLike[str]) -> Path:
    """The file that `path` means: the path itself, or `configs/…` as it comes with the package."""
    path = Path(path)
    for place in _places_of(path):
        if place.exists():
            return place
    return path


def _places_of(path: Path) -> list[Path]:
    places = [path]
    if path.parts[:1] == ("configs",):
        places.append(PACKAGE / path)  # as installed
        places.append(PACKAGE.parent / path)  # in a checkout
    return places


def command_line(arguments: Sequence[str]) -> tuple[Path, list[str]]:
    """Split `[CONFIG.yaml] [key=value …]` into the config's path, by default `DEFAULT_CONFIG`, and the overrides."""
    paths = [argument for argument in arguments if "=" not in argument]
    overrides = [argument for argument in arguments if "=" in argument]
    for path in paths:
        if path.startswith("-"):
            raise ConfigError(
                path, "no such option; keys are set as key=value, and --help lists them"
            )
    if len(paths) > 1:
        raise ConfigError(
            paths[1], f"one config at a time, and {paths[0]} is given already"
        )
    return Path(paths[0]) if paths else DEFAULT_CONFIG, overrides


def help_text() -> str:
    """Every key with its type, default, meaning and unit."""
    lines = [
        f"CONFIG.yaml is by default {find_config(DEFAULT_CONFIG)}; what it leaves out has the defaults below."
    ]
    for name, cls in SECTIONS.items():
        lines.append(f"\n{name}")
        for key_name, item in declared_keys(cls).items():
            unit = f" [{item.unit}]" if item.unit else ""
            lines.append(
                f"  {name}.{key_name}={show(item.default)}  ({type_name(item.hint)})"
            )
            lines.append(f"      {item.meaning}{unit}")
        if issubclass(cls, ComponentSection):
            lines.append(
                "  …  any further key is an argument of the component that `name` names"
            )
    return "\n".join(lines) + OBSERVERS_HELP


def parser_reason(error: Exception) -> str:
    """What a parser says, in one line, without the line of the file: it may hold a secret."""
    for name in ("context_mark", "problem_mark"):
        mark: Any = getattr(error, name, None)
        # That of libyaml's parser cannot be changed, and never shows the line.
        with suppress(AttributeError):
            mark.buffer = None
    return " ".join(str(error).replace('in "<unicode string>", ', "at ").split())


def _check_types(path: Any, overrides: Any) -> None:
    if not isinstance(path, str | os.PathLike | None):
        hint = "; Config.from_dict reads a mapping" if isinstance(path, Mapping) else ""
        raise TypeError(
            f"load() takes the path of a YAML file first, not {path!r}{hint}"
        )
    if isinstance(overrides, Mapping):
        return
    # A single text is a sequence of texts too, its letters.
    is_list = isinstance(overrides, Sequence) and not isinstance(overrides, str | bytes)
    if not is_list or not all(isinstance(override, str) for override in overrides):
        raise TypeError(
            f'load() takes overrides as a list, ["optimizer.lr=0.1"], or a mapping, {{"optimizer.lr": 0.1}}, '
            f"not {overrides!r}"
        )


def _read_file(path: Path, origins: Origins) -> Tree:
    """The file as nested mappings, interpolations still in them; its keys' lines are added to `origins`."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    text = _read_text(path)
    try:
        # OmegaConf keeps no line numbers, so the text is parsed twice.
        document = yaml.compose(text, yaml.SafeLoader)
        if not isinstance(document, yaml.MappingNode | None):
            raise ConfigError(
                str(path),
                "is no mapping of sections; write, for example, batch: {size: 64}",
            )
        for name, line in _key_lines(document, ""):
            origins[name] = f"{path}, line {line}"
        config = OmegaConf.create(text)
        if keep_text(document):
            assert document is not None
            config = OmegaConf.create(serialize(document))
        tree: Tree = cast(Any, OmegaConf.to_container(config))
        return tree
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(
            str(path), f"is not valid YAML: {parser_reason(error)}"
        ) from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        hint = nearest(path.name, _yaml_files_beside(path))
        raise config_error(
            str(path), f"cannot read this config ({error.strerror}){hint}", error
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            str(path),
            f"cannot read this config: it is no text in UTF-8 ({error.reason})",
        ) from None


def _yaml_files_beside(path: Path) -> list[str]:
    names = []
    for place in _places_of(path):
        names += [file.name for file in place.parent.glob("*.yaml")]
    return names


def override_keys(overrides: Overrides) -> list[str]:
    """The dotted keys whose values the overrides give. A list is one value; a mapping changes its own keys alone."""
    return list(_keys_of_values(_read_overrides(overrides, {}), ""))


def _keys_of_values(tree: Tree, prefix: str) -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _keys_of_values(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _read_overrides(overrides: Overrides, origins: Origins) -> Tree:
    """The overrides as nested mappings, interpolations still in them."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    # Objects are refused later, by key.
    changes: Any = OmegaConf.create({}, flags={"allow_objects": True})
    try:
        if isinstance(overrides, Mapping):
            for name, value in overrides.items():
                origins[str(name)] = "the overrides"
                with _fitting(str(name)):
                    OmegaConf.update(changes, str(name), value)
            return cast(Tree, OmegaConf.to_container(changes))
        for override in overrides:
            name, _, _ = override.partition("=")
            origins[name] = "the command line"
            with _fitting(name):
                _add_override(changes, override)
    except OmegaConfBaseException as error:
        raise as_config_error(error) from None
    tree: Tree = map_leaves(OmegaConf.to_container(changes), _none_to_null)
    return tree


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


def _lay_over(tree: Tree, changes: Tree) -> Tree:
    """`tree` under `changes`, interpolations still in it."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    _check_kinds(tree, changes)
    try:
        config: Any = OmegaConf.create(tree, flags={"allow_objects": True})
        # Mappings are merged key by key; a list replaces the file's list, as in `observers=[]`.
        config.merge_with(OmegaConf.create(changes, flags={"allow_objects": True}))
    except OmegaConfBaseException as error:
        raise as_config_error(error) from None
    merged: Tree = cast(Any, OmegaConf.to_container(config))
    return merged


def _check_kinds(tree: Tree, changes: Tree, prefix: str = "") -> None:
    """Raise `ConfigError` where a mapping would be laid over a list, or a list over a mapping."""
    for name in tree.keys() & changes.keys():
        before, after = tree[name], changes[name]
        kinds = {type(before), type(after)}
        if kinds == {dict, list}:
            raise ConfigError(
                f"{prefix}{name}",
                f"{show(after)} is laid over {show(before)}, and a list and a mapping do not fit together",
            )
        if kinds == {dict}:
            _check_kinds(before, after, f"{prefix}{name}.")


def _add_override(changes: Any, override: str) -> None:
    """Set what `key=value` says in an OmegaConf tree."""
    from omegaconf import OmegaConf

    name, equals, value = override.partition("=")
    if not equals or not OVERRIDE_NAME.fullmatch(name):
        raise ConfigError(
            override, "an override is written key=value, as in optimizer.lr=0.01"
        )
    if is_text_key(name) and not (takes_list(name) and value.startswith("[")):
        OmegaConf.update(changes, name, typed_text(value))
        return
    if " #" in value and value[0] not in "[{'\"":
        # Not a comment: whoever types a command comments nothing.
        OmegaConf.update(changes, name, value)
        return
    try:
        document = yaml.compose(value, yaml.SafeLoader)
        if keep_text(document, name):
            assert document is not None
            override = f"{name}={serialize(document)}"
        changes.merge_with_dotlist([override])
    except UnicodeError:
        raise ConfigError(name, f"{value!a} is no text in UTF-8") from None
    except yaml.YAMLError as error:
        raise ConfigError(
            name, f"{value} is not valid YAML: {parser_reason(error)}"
        ) from None


def _none_to_null(value: Any) -> Any:
    # W&B's agent writes a sweep's null in Python's way.
    return None if value == "None" else value


def _key_lines(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, int]]:
    """The dotted keys of a YAML document, `observers[0].name` within lists, with their line numbers."""
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            name = f"{prefix}.{key_node.value}".removeprefix(".")
            yield name, key_node.start_mark.line + 1
            yield from _key_lines(value_node, name)
    elif isinstance(node, yaml.SequenceNode):
        for index, item_node in enumerate(node.value):
            name = f"{prefix}[{index}]"
            yield name, item_node.start_mark.line + 1
            yield from _key_lines(item_node, name)


def _with_origin(error: ConfigError, origins: Origins) -> ConfigError:
    """The error, saying where its key was set, or else a key within it or above it."""
    name = error.key
    # An error on `optimizer.lr` may come from the override `optimizer.lr.x=1`.
    for key in origins:
        if name not in origins and key.startswith(f"{error.key}."):
            name = key
    while name not in origins:
        end = max(name.rfind("."), name.rfind("["))
        if end < 0:
            return error
        name = name[:end]  # its parent
    return ConfigError(error.key, f"{error.message} ({origins[name]})")
