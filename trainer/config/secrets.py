"""What of a config may be shown to others: neither text from the environment nor keys that look like secrets."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import yaml

REDACTED = "<redacted>"
SECRET = re.compile(
    r"(?:^|[_.-])(?:token|secrets?|password|passwd|passphrase|credentials?|auth|(?:api|private|access)_?key)(?:$|[_.-])"
)
LOGIN_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")
VARIABLE = re.compile(r"\boc\.env:\s*(\w+)")
LEAST = 4  # letters of a text that is looked for in messages; a shorter one is no secret, and in many words

_seen: set[str] = set()  # what configs read by this process took from the environment or hold under a secret's key


class FromEnvironment(str):
    """Text that came from the environment; `source` is how the config says so: `${oc.env:NAME}` or what refers to it.

    As YAML it is its source again: a file holds no secret, and reads back to the same config.
    """

    source: str

    def __new__(cls, text: str, source: str) -> FromEnvironment:
        self = super().__new__(cls, text)
        self.source = source
        return self

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]  # for copies
        return str(self), self.source


yaml.SafeDumper.add_representer(
    FromEnvironment, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text.source)
)


def mark_environment(raw: Any, resolved: Any) -> Any:
    """`resolved` with each text that came from the environment as a `FromEnvironment`; `raw` is unresolved."""
    taken = {source: value for source, value in _interpolated(raw, resolved) if "oc.env" in source and value}
    values = set(taken.values())
    _seen.update(values, (os.environ.get(name, "") for source in taken for name in VARIABLE.findall(source)))

    def mark(source: Any, value: Any) -> Any:
        if isinstance(value, Mapping) and isinstance(source, Mapping):
            _seen.update(str(item) for name, item in value.items() if _is_secret(str(name), item))
            return {name: mark(source[name], item) for name, item in value.items()}
        if isinstance(value, list) and isinstance(source, list):
            return [mark(*pair) for pair in zip(source, value, strict=True)]
        if isinstance(value, str) and isinstance(source, str) and "${" in source and any(v in value for v in values):
            return FromEnvironment(value, source)
        return value

    return mark(raw, resolved)


def _interpolated(raw: Any, resolved: Any) -> Iterator[tuple[str, str]]:
    """Each text with an interpolation, and what it resolves to."""
    if isinstance(raw, Mapping) and isinstance(resolved, Mapping):
        for name, item in raw.items():
            yield from _interpolated(item, resolved[name])
    elif isinstance(raw, list) and isinstance(resolved, list):
        for pair in zip(raw, resolved, strict=True):
            yield from _interpolated(*pair)
    elif isinstance(raw, str) and isinstance(resolved, str) and "${" in raw:
        yield raw, resolved


def redacted(tree: Any) -> Any:
    """A copy for the eyes of others."""

    def show(value: Any) -> Any:
        if isinstance(value, FromEnvironment):
            return REDACTED
        return without_logins(value) if isinstance(value, str) else value

    return _replaced(tree, show, hide_secrets=True)


def redacted_message(text: str) -> str:
    """A message, of an error say, that may hold a value of the config."""
    for secret in sorted(_seen, key=len, reverse=True):
        if len(secret) >= LEAST:
            text = text.replace(secret, REDACTED)
    return without_logins(text)


def without_logins(text: str) -> str:
    """Text without what URLs in it say of user and password."""
    return LOGIN_IN_URL.sub(f"{REDACTED}@", text)


def redacted_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line for the eyes of others: `key=value` and `--key=value` as in a config."""
    return [_redacted_argument(argument) for argument in arguments]


def _redacted_argument(argument: str) -> str:
    name, equals, text = argument.partition("=")
    if not equals:
        return str(redacted(argument))
    given = _parsed(text)
    shown = redacted({name: given})[name]
    if shown == given:
        return argument
    return f"{name}={shown if isinstance(shown, str) else yaml.safe_dump(shown, default_flow_style=True).strip()}"


def without_secrets(tree: Any) -> Any:
    """A copy to compare by: text from the environment as its source and a short digest."""

    def digest(value: Any) -> Any:
        if not isinstance(value, FromEnvironment):
            return value
        return f"{value.source} ({hashlib.sha256(value.encode()).hexdigest()[:8]})"

    return _replaced(tree, digest)


def _replaced(tree: Any, replace: Callable[[Any], Any], *, hide_secrets: bool = False) -> Any:
    if isinstance(tree, Mapping):
        return {
            name: REDACTED
            if hide_secrets and _is_secret(str(name), value)
            else _replaced(value, replace, hide_secrets=hide_secrets)
            for name, value in tree.items()
        }
    if isinstance(tree, list | tuple):
        return [_replaced(value, replace, hide_secrets=hide_secrets) for value in tree]
    return replace(tree)


def _is_secret(name: str, value: Any) -> bool:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    return value is not None and not isinstance(value, bool) and SECRET.search(words) is not None


def _parsed(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
