"""A YAML file that builds on others: `base: digits.yaml`, or a list of files, each laid over the one before it.

A base is looked for beside the file that names it, then among the configs that come with the package. It may have a
base itself. The file is laid over what it builds on as the command line is over the file (see `changes`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.config.changes import UNSET, Changes, lay_over, take_unset
from trainer.config.fields import show
from trainer.config.trees import Tree
from trainer.config.yaml_file import (
    YamlFile,
    places_of,
    read_yaml_file,
    yaml_files_beside,
)
from trainer.errors import ConfigError, nearest

BASE = "base"
# Where each key was set: the file and line, or the command line.
Origins = dict[str, str]


def read_with_bases(path: Path, origins: Origins) -> tuple[Tree, list[str]]:
    """The file at `path` laid over its bases, and notes on both; each key's file and line are added to `origins`.

    Raises `ConfigError` for a base that is missing or builds on the file again, and for whatever else is wrong with
    one of the files.
    """
    return _lay_over_bases(read_yaml_file(path), origins, [])


def read_alone(path: Path, origins: Origins) -> tuple[Tree, list[str]]:
    """The file at `path`, as `read_with_bases` gives it. Raises `ConfigError` if it has a base."""
    file = read_yaml_file(path)
    if BASE in file.tree:
        raise ConfigError(
            BASE, f"has no place in {path}: the config of a run holds every key itself"
        )
    return _lay_over_bases(file, origins, [])


def _lay_over_bases(
    file: YamlFile, origins: Origins, above: list[Path]
) -> tuple[Tree, list[str]]:
    path = file.path
    bases = _find_bases(file, [*above, path])
    unset = take_unset(file.tree)
    tree: Tree = {}
    notes = []
    for base in bases:
        base_file = read_yaml_file(base)
        base_tree, base_notes = _lay_over_bases(base_file, origins, [*above, path])
        # Laid over an earlier base, if there is one.
        tree, switches = lay_over(tree, Changes(base_tree, {}), "an earlier base")
        notes += [*base_notes, *switches]
    _add_origins(file, origins)
    if bases:
        names = ", ".join(map(str, bases))
        notes.insert(0, f"{path} builds on {names}")
    source = " and ".join(map(str, bases)) or "a base (there is none)"
    changes: Tree = {}
    for name, value in file.tree.items():
        # A section without a key says nothing, and must not put null in the place of the base's.
        if value is not None or name not in tree:
            changes[name] = value
    tree, switches = lay_over(tree, Changes(changes, unset), source)
    return tree, [*notes, *switches]


def _find_bases(file: YamlFile, above: list[Path]) -> list[Path]:
    """The files that `file` builds on, whose key it loses; `above` are those that build on it, and itself."""
    value = file.tree.pop(BASE, None)
    names = value if isinstance(value, list) else [value]
    if value is None:
        names = []
    bases = []
    for name in names:
        try:
            base = _find(file.path, name)
            _refuse_circle(base, above)
        except ConfigError as error:
            raise ConfigError(
                BASE, f"{error.message} ({file.place_of(BASE)})"
            ) from None
        bases.append(base)
    return bases


def _find(file: Path, name: Any) -> Path:
    if not isinstance(name, str) or "${" in name:
        raise ConfigError(
            BASE,
            f"{show(name)} is neither the name of a YAML file nor a list of names, without interpolations",
        )
    path = Path(name if name.endswith((".yaml", ".yml")) else f"{name}.yaml")
    # A file of one's own in `configs/` is meant only by a base that says so.
    elsewhere = (
        places_of(path)
        if path.parts[:1] == ("configs",)
        else places_of(Path("configs", path))[1:]
    )
    places = [file.parent / path, *elsewhere]
    for place in places:
        if place.is_file():
            return place
    hint = nearest(path.name, yaml_files_beside(places))
    raise ConfigError(
        BASE,
        f"there is no {path} in {file.parent}/, nor among the configs that come with Lockstep{hint}",
    )


def _refuse_circle(base: Path, above: list[Path]) -> None:
    resolved = [path.resolve() for path in above]
    if base.resolve() in resolved:
        circle = [*above[resolved.index(base.resolve()) :], base]
        raise ConfigError(
            BASE, f"files build on one another: {' → '.join(map(str, circle))}"
        )


def _add_origins(file: YamlFile, origins: Origins) -> None:
    for key in file.lines:
        place = file.place_of(key)
        if key.endswith("[0]"):
            _forget_items(key.removesuffix("[0]"), origins)
        parent, dot, name = key.rpartition(".")
        origins[f"{parent}{dot}{name.removeprefix(UNSET)}"] = place


def _forget_items(key: str, origins: Origins) -> None:
    """A list replaces the base's, so the places of the base's items say nothing any more."""
    for name in list(origins):
        if name.startswith(f"{key}["):
            del origins[name]
