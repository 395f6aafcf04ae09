"""Read a config: a YAML file, the files it builds on, and overrides laid over it. And the text of `--help`.

Errors name the key, where it was set (file and line, or the command line), and the nearest valid name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.config.base import Origins, read_alone, read_with_bases
from trainer.config.changes import lay_over
from trainer.config.component_lists import TrackerConfig
from trainer.config.fields import ComponentSection, declared_keys, show, type_name
from trainer.config.overrides import TOO_DEEP, Overrides, is_unset, read_overrides
from trainer.config.schema import SECTIONS, Config
from trainer.config.trees import Tree
from trainer.config.yaml_file import find_config
from trainer.errors import ConfigError

DEFAULT_CONFIG = Path("configs/digits.yaml")

LISTS_HELP = """
metrics
  metrics=[]  (list of mappings)
      computed over all validation samples at once: [{name: torchmetrics.classification.MulticlassF1Score}]; the other
      keys are its arguments, and log_as its column, val/<log_as>, by default val/f1_score; see docs/metrics.md

observers
  observers=[]  (list of mappings)
      called in every step, in this order: [{name: my_package.MyObserver, argument: value}]

trackers
  trackers=[]  (list of mappings)
      where rows go besides metrics.jsonl and W&B: [{name: tensorboard}, {name: csv}], each with (docs/trackers.md)"""


def load(
    path: str | os.PathLike[str] | None = None, overrides: Overrides = ()
) -> Config:
    """Read the YAML file at `path` (without one: the defaults), lay overrides over it and check everything.

    A path within `configs/` that does not exist is looked for among the configs that come with the package. A file may
    build on others, `base: digits.yaml` (see `trainer.config.base`).
    Overrides are texts, `["optimizer.lr=0.1"]`, or a mapping of dotted keys to values, `{"optimizer.lr": 0.1}`. The
    value of a text is the text as typed where the key is text, and YAML elsewhere; `None` is null too, as W&B's agent
    writes it. `"~optimizer.momentum"` (in a mapping, with the value None) unsets a key. Values may use OmegaConf's
    interpolations, `${oc.env:NAME}` for example. An override that names another component than the file drops the
    file's arguments of the old one (`Config.notes` says which).

    Raises `ConfigError` with the key, where it was set and the nearest valid one; `TypeError` for anything else than a
    path and overrides.
    """
    return _load(path, overrides, read_with_bases)


def load_resolved(path: Path, overrides: Overrides = ()) -> Config:
    """The config that a run has written, which builds on no other file: one from elsewhere must not name files here.

    Raises `ConfigError` as `load` does, and for a base.
    """
    return _load(path, overrides, read_alone)


def _load(
    path: str | os.PathLike[str] | None,
    overrides: Overrides,
    read: Callable[[Path, Origins], tuple[Tree, list[str]]],
) -> Config:
    _check_types(path, overrides)
    origins: Origins = {}
    tree: Tree = {}
    notes: list[str] = []
    try:
        if path is not None:
            tree, notes = read(find_config(path), origins)
        changes = read_overrides(overrides, origins)
        tree, switches = lay_over(
            tree, changes, "the defaults" if path is None else "the file"
        )
        config = Config.from_dict(tree)
        return replace(config, notes=(*notes, *switches))
    except ConfigError as error:
        raise _with_origin(error, origins) from None
    except RecursionError:
        raise ConfigError("config" if path is None else str(path), TOO_DEEP) from None


def command_line(arguments: Sequence[str]) -> tuple[Path, list[str]]:
    """Split `[CONFIG.yaml] [key=value …] [~key …]` into the config's path (`DEFAULT_CONFIG`) and the overrides."""
    paths: list[str] = []
    overrides: list[str] = []
    for argument in arguments:
        is_override = "=" in argument or is_unset(argument)
        (overrides if is_override else paths).append(argument)
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
        lines += _describe_keys(cls, f"{name}.")
        if issubclass(cls, ComponentSection):
            lines.append(
                f"  …  any further key is an argument of the component that `name` names: --help {name}.NAME lists them"
            )
    lines.append(LISTS_HELP)
    lines += _describe_keys(TrackerConfig, "    ")
    return "\n".join(lines)


def _describe_keys(cls: Any, prefix: str) -> Iterator[str]:
    for name, item in declared_keys(cls).items():
        unit = f" [{item.unit}]" if item.unit else ""
        yield f"  {prefix}{name}={show(item.default)}  ({type_name(item.hint)})"
        yield f"      {item.meaning}{unit}"


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
