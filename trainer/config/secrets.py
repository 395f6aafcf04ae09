"""What of a config others must not see: values under names such as `token`, logins in URLs, environment text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import yaml

from trainer.config.trees import leaves_in, texts_in

REDACTED = "<redacted>"
# Whole words of a name: `api_key` and `hub.token` are secrets, `max_tokens` and `author` are not.
SECRET_NAME = re.compile(
    r"(?:^|[_.-])(?:token|secrets?|password|passwd|passphrase|credentials?|auth|(?:api|private|access)_?key)(?:$|[_.-])"
)
LOGIN_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")
# A shorter text occurs in many words, so removing it would garble messages.
MIN_SECRET_LETTERS = 4

# Of the configs that this process made: what stands under a secret's name or came from the environment as a
# component's argument, and what came from there for Lockstep's own keys: paths and names.
_secrets: set[str] = set()
_settings: set[str] = set()


def remember_secrets(texts: Iterable[str]) -> None:
    """Have `redacted_message` and `redacted_output` remove these texts from now on."""
    _secrets.update(_spellings(texts))


def remember_settings(texts: Iterable[str]) -> None:
    """Have `redacted_message` remove these texts from now on: they are others' business no more than secrets."""
    _settings.update(_spellings(texts))


def remember_argument_secrets(arguments: Iterable[str]) -> None:
    """Remember the secrets of a command line as typed: a mistake in it may be reported before any config is made."""
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if equals:
            remember_secrets(secrets_in({name: text}))


def _spellings(texts: Iterable[str]) -> Iterator[str]:
    """Each text as it is, and as Python and JSON write it within quotes."""
    for text in texts:
        if len(text) >= MIN_SECRET_LETTERS:
            yield text
            yield repr(text)[1:-1]
            yield json.dumps(text)[1:-1]


def secrets_in(tree: Any) -> Iterator[str]:
    """The texts that stand under a secret's name anywhere in nested mappings and lists."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            if _is_secret(name, value):
                for leaf in leaves_in(value):
                    yield str(leaf)
            else:
                yield from secrets_in(value)
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from secrets_in(item)


def redacted(tree: Any) -> Any:
    """A copy of a config, or of a part of it, for the eyes of others.

    Of text from the environment a config shows the reference (see `interpolation`), which stays: it is no secret.
    """
    if isinstance(tree, Mapping):
        copy = {}
        for name, value in tree.items():
            copy[name] = REDACTED if _is_secret(name, value) else redacted(value)
        return copy
    if isinstance(tree, list | tuple):
        return [redacted(item) for item in tree]
    return without_logins(tree) if isinstance(tree, str) else tree


def redacted_message(text: str) -> str:
    """A message for others, of an error for example, without anything that it quotes from the environment."""
    return _without(_secrets | _settings, text)


def redacted_output(text: str) -> str:
    """What is printed or written on this machine, without secrets. Paths and names from the environment stay."""
    return _without(_secrets, text)


def redacted_value(name: str, value: Any) -> Any:
    """What may be shown of the value of a dotted key."""
    return redacted({name: value})[name]


def holds_secret(tree: Any) -> bool:
    """True if a config says a secret itself, and not only where in the environment it is."""
    if any("${" not in text for text in secrets_in(tree)):
        return True
    return any(LOGIN_IN_URL.search(text) for text in texts_in(tree))


def _without(secrets: set[str], text: str) -> str:
    # Longest first: a secret may be part of another.
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, REDACTED)
    return without_logins(text)


def without_logins(text: str) -> str:
    """`text` with the user and password of each URL redacted."""
    return LOGIN_IN_URL.sub(f"{REDACTED}@", text)


def redacted_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line for the eyes of others; `key=value` and `--key=value` are redacted as in a config."""
    return [_redacted_argument(argument) for argument in arguments]


def _redacted_argument(argument: str) -> str:
    name, equals, text = argument.partition("=")
    if not equals:
        return without_logins(argument)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    public = redacted({name: value})[name]
    if public == value:
        return argument  # as it was typed
    if not isinstance(public, str):
        public = yaml.safe_dump(public, default_flow_style=True).strip()
    return f"{name}={public}"


def _is_secret(name: Any, value: Any) -> bool:
    # `auth: true` and `token: null` say nothing.
    if value is None or isinstance(value, bool):
        return False
    return _is_secret_name(str(name))


@cache  # few names, looked at each time a config is made
def _is_secret_name(name: str) -> bool:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()  # apiKey → api_key
    return SECRET_NAME.search(words) is not None
