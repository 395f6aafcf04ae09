"""`--help optimizer`, `--help optimizer.adamw`: the keys and names of a section, the arguments of a component."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from trainer.commands.component_places import PLACES, metric_path
from trainer.commands.docstrings import (
    ArgumentNote,
    argument_notes,
    passed_on_to,
    plain,
    summary,
)
from trainer.config.component_lists import LISTS
from trainer.config.fields import (
    ComponentSection,
    Key,
    current_path,
    declared_keys,
    show,
    type_name,
)
from trainer.config.registry import resolve
from trainer.config.schema import SECTIONS
from trainer.config.train_section import MixConfig
from trainer.errors import ConfigError, nearest

WIDTH = 110  # columns of the text
MODULE_OF_NAME = re.compile(r"\b(?:\w+\.)+(\w+)")
MAX_TYPE_LETTERS = 80
# Keys that hold keys of their own.
NESTED = {"train.mix": MixConfig}


def topic_help(topic: str) -> str:
    """The help on a section, a key or a component: `optimizer`, `optimizer.lr`, `optimizer.torch.optim.RMSprop`.

    Raises `ConfigError`, with the nearest name, for what is none of them.
    """
    return "\n".join(_topic_lines(topic))


def _topic_lines(topic: str) -> Iterator[str]:
    section, _, rest = topic.partition(".")
    if section not in SECTIONS and section not in LISTS:
        hint = nearest(section, [*SECTIONS, *LISTS])
        raise ConfigError(topic, f"no such section; --help lists them{hint}")
    keys = _keys_of(section)
    for place, cls in NESTED.items():
        inner = topic.removeprefix(f"{place}.")
        if inner != topic:
            yield from _key_lines_of(topic, place, inner, declared_keys(cls))
            return
    # Of `data.train_transforms.RandomCrop` the place is the longest.
    for place in sorted(PLACES, key=len, reverse=True):
        name = topic.removeprefix(f"{place}.")
        first, _, _ = name.partition(".")
        if name != topic and first not in keys:
            yield from _component_lines(place, name)
            return
    if not rest:
        yield from _section_lines(section, keys)
        return
    yield from _key_lines_of(topic, section, rest, keys)
    yield from _inner_lines(topic)
    yield from _name_lines(topic)


def _keys_of(section: str) -> dict[str, Key]:
    return declared_keys((SECTIONS | LISTS)[section])


def _key_lines_of(
    topic: str, section: str, name: str, keys: Mapping[str, Key]
) -> Iterator[str]:
    """The help on one key of a section, which `topic` names."""
    if name in keys:
        yield from _key_lines(section, name, keys[name])
        return
    owner, dot, _ = name.partition(".")
    if dot and owner in keys:
        raise ConfigError(
            topic, f"no such topic; --help {section}.{owner} says what it takes"
        )
    raise ConfigError(topic, f"no such key{nearest(name, keys)}")


def _inner_lines(topic: str) -> Iterator[str]:
    """The keys that a key holds, such as those of `train.mix`."""
    if topic in NESTED:
        yield "\nits keys"
        for name, key in declared_keys(NESTED[topic]).items():
            yield from _key_lines(topic, name, key)


def _section_lines(section: str, keys: Mapping[str, Key]) -> Iterator[str]:
    yield section
    for name, key in keys.items():
        yield from _key_lines(section, name, key)
    yield from _name_lines(section)
    if issubclass((SECTIONS | LISTS)[section], ComponentSection):
        yield f"\n--help {section}.NAME shows the arguments of one of them, or of an import path"


def _name_lines(place: str) -> Iterator[str]:
    names = PLACES[place].names() if place in PLACES else {}
    if names:
        yield "\nnames"
        yield _wrapped(", ".join(names), "  ")


def _key_lines(section: str, name: str, key: Key) -> Iterator[str]:
    unit = f" [{key.unit}]" if key.unit else ""
    yield f"  {section}.{name}={show(key.default)}  ({type_name(key.hint)})"
    yield _wrapped(f"{key.meaning}{unit}", "      ")


def _component_lines(place: str, name: str) -> Iterator[str]:
    kind = PLACES[place]
    if place == "metrics":
        name = metric_path(name)
    target = _find(place, name)
    module = getattr(target, "__module__", "")
    home = f"{module}.{getattr(target, '__qualname__', '')}"
    is_own = home.startswith("trainer.")
    is_plain = is_own or home == name
    yield f"{place}.{name}" if is_plain else f"{place}.{name}  ({home})"
    for paragraph in summary(target, whole=is_own).splitlines():
        yield _wrapped(paragraph, "  ")
    section, _, _ = place.partition(".")
    # The section's own keys stand beside the arguments in a config, so no argument is given under their names.
    keys = _keys_of(section) if place == section else {}
    hidden = {*kind.supplied, *keys}
    # A schedule of one's own is given the position and the run's length.
    positional = 2 if place == "schedule" and "." in name else kind.positional
    lines = list(_argument_lines(place, target, positional, hidden, kind.filled))
    yield "\narguments" if lines else "\nIt takes no arguments."
    yield from lines
    if place == section:
        owner = "the section" if section in SECTIONS else "each item"
        yield f"\nkeys of {owner}, whatever the name (--help {section})"
        yield _wrapped(", ".join(keys), "  ")


def _find(place: str, name: str) -> Any:
    names = PLACES[place].names()
    if name not in names and "." not in name:
        keys = _keys_of(place) if place in SECTIONS | LISTS else {}
        known = list(keys)
        for short in names:
            # Of a name that is an import path, its last part is what one remembers.
            _, _, last = short.rpartition(".")
            known.append(last)
        raise ConfigError(
            f"{place}.{name}",
            f"neither one of the names that --help {place} lists nor an import path{nearest(name, known)}",
        )
    return resolve(place, current_path(name), names)


def _argument_lines(
    place: str,
    target: Any,
    positional: int,
    hidden: set[str],
    filled: tuple[str, ...],
) -> Iterator[str]:
    """A line for each argument that a config may give, and one for what is said of it."""
    notes = argument_notes(target)
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # as of what is written in C
        yield "  …  it does not say which arguments it takes"
        return
    parameters = list(signature.parameters.values())
    for parameter in parameters[positional:]:
        if parameter.kind is parameter.VAR_KEYWORD:
            yield from _passed_on_lines(place, target, hidden)
            continue
        is_by_name = parameter.kind is not parameter.VAR_POSITIONAL
        if is_by_name and parameter.name not in hidden:
            is_filled = parameter.name in filled
            yield from _parameter_lines(place, parameter, notes, is_filled=is_filled)


def _passed_on_lines(place: str, target: Any, hidden: set[str]) -> Iterator[str]:
    """The arguments that a function passes on to a class: those with a default, as it gives the others itself."""
    path = passed_on_to(target)
    other = None
    # A docstring may be wrong about it, as that of torchvision's SqueezeNet is.
    with suppress(ConfigError):
        if path is not None:
            other = resolve(place, path, {})
    if other is None:
        yield "  …  any further key is passed on"
        return
    notes = argument_notes(other)
    for parameter in inspect.signature(other).parameters.values():
        has_default = parameter.default is not parameter.empty
        if has_default and parameter.name not in hidden:
            yield from _parameter_lines(place, parameter, notes)


def _parameter_lines(
    place: str,
    parameter: inspect.Parameter,
    notes: Mapping[str, ArgumentNote],
    *,
    is_filled: bool = False,
) -> Iterator[str]:
    note = notes.get(parameter.name, ArgumentNote("", ""))
    # An argument of a list's item has no dotted key.
    name = f"{place}.{parameter.name}" if place in SECTIONS else parameter.name
    is_needed = parameter.default is parameter.empty
    value = " is needed" if is_needed else f"={show(_writable(parameter.default))}"
    if is_filled:
        value = " from the run, unless given"
    kind = _annotation(parameter) or note.type
    yield f"  {name}{value}" + (f"  ({kind})" if kind else "")
    if note.text:
        yield _wrapped(plain(note.text), "      ")


def _wrapped(text: str, indent: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=indent)


def _writable(value: Any) -> Any:
    """A default as YAML would give it: a tuple as a list."""
    return list(value) if isinstance(value, tuple) else value


def _annotation(parameter: inspect.Parameter) -> str:
    if parameter.annotation is parameter.empty:
        return ""
    text = parameter.annotation
    if not isinstance(text, str):
        text = inspect.formatannotation(text)
    text = MODULE_OF_NAME.sub(r"\1", text).replace("NoneType", "None")
    if len(text) > MAX_TYPE_LETTERS:
        text = f"{text[:MAX_TYPE_LETTERS]}…"
    return text
