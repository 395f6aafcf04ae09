"""A config read: a YAML file, `key=value` overrides laid over it, everything checked; and `--help`'s text.

What is wrong is told with the key, where it was set, and the nearest valid one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from trainer.config.fields import show, type_name
from trainer.config.schema import Config
from trainer.config.secrets import mark_environment
from trainer.errors import ConfigError, nearest

DEFAULT_CONFIG = Path("configs/digits.yaml")


def load(path: Path | None, overrides: Sequence[str]) -> Config:
    """Read `path` (defaults alone where it is None), lay the `key=value` overrides over it, check everything.

    Values of the file may use OmegaConf's interpolations, `${oc.env:NAME}` among them. In an override `None` is null
    too: that is how W&B's agent writes it.
    Raises `ConfigError` with the key, where it came from and the nearest valid one.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    lines: dict[str, str] = {}
    tree: Any = {}
    if path is not None:
        text = _read(path)
        try:
            document = yaml.compose(text, yaml.SafeLoader)
            if not isinstance(document, yaml.MappingNode | None):
                raise ConfigError(str(path), "is no mapping of sections; write, for example, batch: {size: 64}")
            lines = {k: f"{path}, line {line}" for k, line in _lines(document, "")}
            tree = OmegaConf.create(text)
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(str(path), f"is not valid YAML: {parser_reason(error)}") from None
    try:
        for override in overrides:
            lines[_checked(override)] = "the command line"
        laid_over = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)), resolve=False)
        merged = OmegaConf.merge(tree or {}, OmegaConf.create(_none_is_null(laid_over)))
        plain = mark_environment(OmegaConf.to_container(merged), OmegaConf.to_container(merged, resolve=True))
        return Config.from_dict(plain)  # keys are checked there
    except ConfigError as error:
        raise _with_origin(error, lines) from None
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        name = str(getattr(error, "full_key", "") or path or "command line")
        raise _with_origin(ConfigError(name, str(error).splitlines()[0]), lines) from None


def _checked(override: str) -> str:
    """The key of `key=value`, whose value is YAML."""
    name, equals, value = override.partition("=")
    if not equals or not name:
        raise ConfigError(override, "an override is written key=value, as in optimizer.lr=0.01")
    try:
        yaml.compose(value, yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(name, f"{value} is not valid YAML: {parser_reason(error)} (the command line)") from None
    return name


def parser_reason(error: Exception) -> str:
    """What a parser says, in one line."""
    return " ".join(str(error).replace('in "<unicode string>", ', "at ").split())


def command_line(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Split `[CONFIG.yaml] [key=value …]`; without a CONFIG the default one is meant."""
    paths = [argument for argument in arguments if "=" not in argument]
    for extra in paths:
        if extra.startswith("-"):
            raise ConfigError(extra, "no such option; keys are set as key=value, and --help lists them")
    if len(paths) > 1:
        raise ConfigError(paths[1], f"one config at a time, and {paths[0]} is given already")
    path = Path(paths[0]) if paths else DEFAULT_CONFIG
    return path, [argument for argument in arguments if "=" in argument]


def help_text() -> str:
    """Every key with its type, default, meaning and unit."""
    out = []
    for section in fields(Config):
        cls = get_type_hints(Config)[section.name]
        hints = get_type_hints(cls)
        out.append(f"\n{section.name}")
        for item in fields(cls):
            if "arguments" in item.metadata:
                out.append("  …  any further key is an argument of the component that `name` names")
                continue
            default = item.default_factory() if callable(item.default_factory) else item.default
            unit = f" [{item.metadata['unit']}]" if item.metadata["unit"] else ""
            out.append(f"  {section.name}.{item.name}={show(default)}  ({type_name(hints[item.name])})")
            out.append(f"      {item.metadata['meaning']}{unit}")
    return "\n".join(out)


def _none_is_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _none_is_null(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_none_is_null(inner) for inner in value]
    return None if value == "None" else value


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        near = nearest(path.name, [p.name for p in path.parent.glob("*.yaml")]) if path.parent.is_dir() else ""
        raise ConfigError(str(path), f"cannot read this config ({error.strerror}){near}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), f"cannot read this config: it is no text in UTF-8 ({error.reason})") from None


def _lines(node: yaml.Node | None, prefix: str) -> list[tuple[str, int]]:
    """The dotted keys of a YAML document with their line numbers."""
    found = []
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            dotted = f"{prefix}{name.value}"
            found.append((dotted, name.start_mark.line + 1))
            found += _lines(value, f"{dotted}.")
    return found


def _with_origin(error: ConfigError, lines: Mapping[str, str]) -> ConfigError:
    """The error, saying where its key, one within it, or the nearest one above it, was set."""
    within = [name for name in lines if name.startswith(f"{error.key}.")]
    name = error.key if error.key in lines else next(iter(within), error.key)
    while name and name not in lines:
        name = name.rpartition(".")[0]
    return ConfigError(error.key, f"{error.message} ({lines[name]})") if name else error
