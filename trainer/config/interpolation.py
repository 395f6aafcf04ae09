"""`${oc.env:NAME}` and other OmegaConf interpolations of a config: resolved to be used, kept as text to be written.

A file that a run writes must not hold what came from the environment, and must read back to the same config. So
each value that came from there keeps the text it was written as, its reference, beside it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from trainer.config.secrets import remember_secrets, texts_in
from trainer.errors import ConfigError

VARIABLE = re.compile(r"\boc\.env\s*:\s*(\w+)")
LITERAL_DOLLAR = re.compile(r"(\\*)\$\{")

Path = tuple[Any, ...]  # the keys, and indices within lists, that lead to a value


class Reference(NamedTuple):
    """The text a value was written as, and the value it had when the config was read."""

    text: str
    value: Any


def resolve(tree: Mapping[str, Any]) -> tuple[dict[str, Any], dict[Path, Reference]]:
    """The tree with its interpolations resolved, and the reference of each value that came from the environment.

    Raises `ConfigError` with the key of an interpolation that cannot be resolved.
    """
    if not any("${" in text for text in texts_in(tree)):
        return dict(tree), {}
    from omegaconf import OmegaConf  # slow to import, and most configs made in Python do without
    from omegaconf.errors import OmegaConfBaseException

    try:
        config = OmegaConf.create(dict(tree), flags={"allow_objects": True})
        resolved: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error.full_key or "config"), str(error).splitlines()[0]) from None
    return resolved, _references(dict(_interpolated(tree, resolved)))


def restore_references(tree: dict[str, Any], references: Mapping[Path, Reference], *, digests: bool = False) -> None:
    """In `tree`, which is escaped, put each reference in the place of its value, if that has not changed since.

    With `digests` a short SHA-256 of the value follows, by which a change of the environment is noticed.
    """
    for path, reference in references.items():
        text = reference.text
        if digests:
            text += f" ({hashlib.sha256(str(reference.value).encode()).hexdigest()[:8]})"
        with suppress(LookupError, TypeError):  # the config was changed in Python, and the place is gone
            parent: Any = tree
            for name in path[:-1]:
                parent = parent[_key_in(parent, name)]
            last = _key_in(parent, path[-1])
            if parent[last] == escape(reference.value):
                parent[last] = text


def _key_in(parent: Any, name: Any) -> Any:
    """`name`, or its text: some sections hold the keys of a mapping as text."""
    return str(name) if isinstance(parent, Mapping) and name not in parent else name


def escape(value: Any) -> Any:
    """A copy in which `${` is meant literally: as OmegaConf reads it, `\\${`."""
    if isinstance(value, str):
        # A backslash before `${` escapes it, so backslashes of the text itself are doubled there.
        return LITERAL_DOLLAR.sub(r"\1\1\\${", value)
    if isinstance(value, Mapping):
        return {name: escape(item) for name, item in value.items()}
    if isinstance(value, list):
        return [escape(item) for item in value]
    return value


def _references(interpolated: Mapping[Path, Reference]) -> dict[Path, Reference]:
    """Those of the interpolated values that hold text from the environment, directly or through another key.

    Numbers do not count: a config's number is no secret, and config.yaml should say it.
    """
    secrets: set[str] = set()
    for text, value in interpolated.values():
        if "oc.env" in text:
            secrets.update(texts_in(value))
            secrets.update(os.environ.get(name, "") for name in VARIABLE.findall(text))
    secrets.discard("")
    remember_secrets(secrets)
    return {path: item for path, item in interpolated.items() if _contains_any(item.value, secrets)}


def _contains_any(value: Any, secrets: Iterable[str]) -> bool:
    return any(secret in text for text in texts_in(value) for secret in secrets)


def _interpolated(raw: Any, resolved: Any, path: Path = ()) -> Iterator[tuple[Path, Reference]]:
    """Every value that an interpolation had a part in, with its path."""
    if isinstance(raw, str):
        if "${" in raw:
            yield path, Reference(raw, resolved)
    elif isinstance(raw, Mapping):
        for name, item in raw.items():
            yield from _interpolated(item, resolved[name], (*path, name))
    elif isinstance(raw, list | tuple):
        for index, item in enumerate(raw):
            yield from _interpolated(item, resolved[index], (*path, index))
