"""`${oc.env:NAME}` and other OmegaConf interpolations of a config: resolved to be used, kept as text to be written.

A file that a run writes must not hold what came from the environment, and must read back to the same config. So
each value that came from there keeps the text it was written as, its reference, beside it.

Resolving a second time with an `oc.env` that returns the reference would not do: `oc.decode`, and any resolver that a
user registers, would get the reference to work on and resolve or garble it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from trainer.config.secrets import remember_secrets, remember_settings
from trainer.config.trees import Tree, map_leaves, texts_in
from trainer.errors import ConfigError

VARIABLE = re.compile(r"\boc\.env\s*:\s*(\w+)")
BEFORE_INTERPOLATION = re.compile(r"(\\*)\$\{")


class Reference(NamedTuple):
    """The text a value was written as, and the value it had when the config was read."""

    text: str
    value: Any


Path = tuple[Any, ...]  # the keys, and the indices in lists, that lead to a value
References = dict[Path, Reference]


def resolve(
    tree: Mapping[str, Any], is_setting: Callable[[Path], bool]
) -> tuple[Tree, References]:
    """The tree with its interpolations resolved, and the references of what came from the environment.

    `is_setting` tells a key of Lockstep's own, which holds a path or a name, from an argument, which may be a secret.
    Raises `ConfigError` with the key of an interpolation that cannot be resolved.
    """
    if not any("${" in text for text in texts_in(tree)):
        return dict(tree), {}
    # Slow to import, and most configs made in Python do without.
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        config = OmegaConf.create(dict(tree), flags={"allow_objects": True})
        resolved: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise as_config_error(error) from None
    references = dict(_interpolated(tree, resolved))
    for path, reference in references.items():
        remember = remember_settings if is_setting(path) else remember_secrets
        remember(_environment_texts([reference]))
    secrets = _environment_texts(references.values())
    for path, reference in list(references.items()):
        # A key that refers to another holds what that one took from the environment.
        if not _contains_any(reference.value, secrets):
            del references[path]
    return resolved, references


def as_config_error(error: Any) -> ConfigError:
    """What OmegaConf says in the first line of its error, with the key it names."""
    reason, *_ = str(error).splitlines()
    return ConfigError(error.full_key or "config", reason)


def restore_references(
    tree: Tree, references: References, *, digests: bool = False
) -> None:
    """In `tree`, which is escaped, put each reference in the place of its value, if that has not changed since.

    With `digests` a short SHA-256 of the value follows, by which a change of the environment is noticed.
    """
    for path, reference in references.items():
        text = reference.text
        if digests:
            digest = hashlib.sha256(str(reference.value).encode()).hexdigest()
            text += f" ({digest[:8]})"
        # The config was changed in Python, and the place is gone.
        with suppress(LookupError, TypeError):
            parent: Any = tree
            for name in path[:-1]:
                parent = parent[_key_in(parent, name)]
            last = _key_in(parent, path[-1])
            if parent[last] == map_leaves(reference.value, escape):
                parent[last] = text


def escape(value: Any) -> Any:
    """Text in which `${` is meant literally, as OmegaConf reads it: `\\${`. Other values stay as they are."""
    if not isinstance(value, str):
        return value
    # Backslashes of the text itself are doubled there, because an odd one escapes the `${`.
    return BEFORE_INTERPOLATION.sub(r"\1\1\\${", value)


def _key_in(parent: Any, name: Any) -> Any:
    """`name`, or its text: some sections hold the keys of a mapping as text."""
    if isinstance(parent, Mapping) and name not in parent:
        return str(name)
    return name


def _environment_texts(interpolated: Iterable[Reference]) -> set[str]:
    """The texts that interpolations took from environment variables.

    Numbers do not count: a config's number is no secret, and config.yaml should say it.
    """
    texts: set[str] = set()
    for reference in interpolated:
        if "oc.env" in reference.text:
            texts.update(texts_in(reference.value))
            for name in VARIABLE.findall(reference.text):
                texts.add(os.environ.get(name, ""))
    texts.discard("")
    return texts


def _contains_any(value: Any, secrets: Iterable[str]) -> bool:
    texts = "\n".join(texts_in(value))
    return any(secret in texts for secret in secrets)


def _interpolated(
    raw: Any, resolved: Any, *path: Any
) -> Iterator[tuple[Path, Reference]]:
    """Every value that an interpolation had a part in, with its path."""
    if isinstance(raw, str):
        if "${" in raw:
            yield path, Reference(raw, resolved)
    elif isinstance(raw, Mapping):
        for name, item in raw.items():
            yield from _interpolated(item, resolved[name], *path, name)
    elif isinstance(raw, list | tuple):
        for index, item in enumerate(raw):
            yield from _interpolated(item, resolved[index], *path, index)
