"""One YAML file of a config: its text as nested mappings, and the line of each key."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml

from trainer.config.trees import Tree
from trainer.config.yaml_text import keep_text, serialize
from trainer.errors import ConfigError, config_error, nearest

# A pip-installed package brings its own configs/ with it.
PACKAGE = Path(__file__).parents[1]


class YamlFile(NamedTuple):
    """A file as nested mappings, interpolations still in them, and the line of each dotted key."""

    path: Path
    tree: Tree
    lines: dict[str, int]

    def place_of(self, key: str) -> str:
        """Where a key stands, for a message."""
        return f"{self.path}, line {self.lines[key]}"


def find_config(path: str | os.PathLike[str]) -> Path:
    """The file that `path` means: the path itself, or `configs/…` as it comes with the package."""
    path = Path(path)
    for place in places_of(path):
        if place.exists():
            return place
    return path


def places_of(path: Path) -> list[Path]:
    """Where `find_config` looks, in order."""
    places = [path]
    if path.parts[:1] == ("configs",):
        places.append(PACKAGE / path)  # as installed
        places.append(PACKAGE.parent / path)  # in a checkout
    return places


def read_yaml_file(path: Path) -> YamlFile:
    """The file at `path`. Raises `ConfigError` for one that cannot be read, or is no mapping."""
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
        lines = dict(_key_lines(document, ""))
        config = OmegaConf.create(text)
        if _keep_text(path, document, lines):
            assert document is not None
            config = OmegaConf.create(serialize(document))
        tree: Tree = cast(Any, OmegaConf.to_container(config))
        return YamlFile(path, tree, lines)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(
            str(path), f"is not valid YAML: {parser_reason(error)}"
        ) from None


def _keep_text(path: Path, document: Any, lines: dict[str, int]) -> bool:
    try:
        return keep_text(document)
    except ConfigError as error:
        place = f" ({path}, line {lines[error.key]})" if error.key in lines else ""
        raise ConfigError(error.key, f"{error.message}{place}") from None


def parser_reason(error: Exception) -> str:
    """What a parser says, in one line, without the line of the file: it may hold a secret."""
    for name in ("context_mark", "problem_mark"):
        mark: Any = getattr(error, name, None)
        # That of libyaml's parser cannot be changed, and never shows the line.
        with suppress(AttributeError):
            mark.buffer = None
    return " ".join(str(error).replace('in "<unicode string>", ', "at ").split())


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        hint = nearest(path.name, yaml_files_beside(places_of(path)))
        raise config_error(
            str(path), f"cannot read this config ({error.strerror}){hint}", error
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            str(path),
            f"cannot read this config: it is no text in UTF-8 ({error.reason})",
        ) from None


def yaml_files_beside(places: list[Path]) -> list[str]:
    """The names of the YAML files in the folders of some paths."""
    names = []
    for place in places:
        names += [file.name for file in place.parent.glob("*.yaml")]
    return names


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
