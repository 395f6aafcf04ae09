"""Arguments that a component's annotations declare as text, and a config gives as numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, get_args, get_origin, get_type_hints

from trainer.config.fields import is_union, show
from trainer.errors import ConfigError


def check_texts(
    section: str, target: Callable[..., Any], arguments: Mapping[str, Any]
) -> None:
    """Raise `ConfigError` for a number or boolean where `target` is annotated with `str` or a sequence of it.

    What was typed is no longer known: YAML reads `0777` as 511 and `no` as false.
    """
    numbers = {name: value for name, value in arguments.items() if _holds_number(value)}
    if not numbers:
        return
    hints = _hints_of(target)
    for name, value in numbers.items():
        hint = hints.get(name)
        is_sequence = isinstance(value, list)
        if _is_texts(hint) if is_sequence else _is_text(hint):
            number = next(filter(_is_number, value)) if is_sequence else value
            raise ConfigError(
                f"{section}.{name}",
                f"{show(number)} is not text, and text is what this argument takes; write it as typed and in quotes, "
                f"on the command line within a second pair: {section}.{name}=\"'…'\"",
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float)


def _holds_number(value: Any) -> bool:
    return any(map(_is_number, value)) if isinstance(value, list) else _is_number(value)


def _hints_of(target: Callable[..., Any]) -> dict[str, Any]:
    """The type of each annotated parameter; {} where the annotations cannot be read."""
    function = target.__init__ if inspect.isclass(target) else target
    with suppress(
        Exception
    ):  # an annotation is any expression, and names what it likes
        return get_type_hints(function)
    return {}


def _is_text(hint: Any) -> bool:
    """True for `str` and `str | None`."""
    if is_union(hint):
        members = [member for member in get_args(hint) if member is not type(None)]
        return bool(members) and all(_is_text(member) for member in members)
    return hint is str


def _is_texts(hint: Any) -> bool:
    """True for `list[str]` and its like, null allowed."""
    if is_union(hint):
        return any(_is_texts(member) for member in get_args(hint))
    origin = get_origin(hint)
    if not isinstance(origin, type) or not issubclass(origin, Sequence):
        return False
    return get_args(hint)[:1] == (str,)
