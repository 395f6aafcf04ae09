"""Text that stays text in YAML, on the command line and in files that are written.

YAML reads `12e4567` as infinity, `0777` as 511 and `1:30` as 90. Where a key of the config is text, what was typed is
meant; where it is not, a number that is another than it looks like is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args, get_origin

import yaml

from trainer.config.component_lists import LISTS
from trainer.config.evaluation_sets import EvaluationSetConfig, key_of_set
from trainer.config.fields import declared_keys, is_union
from trainer.config.schema import SECTIONS
from trainer.errors import ConfigError

STRING_TAG = "tag:yaml.org,2002:str"
NULLS = ("", "~", "null")
OCTAL = re.compile(r"[-+]?0[0-7_]+")
SEXAGESIMAL = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
EXPONENT = re.compile(r"[-+]?(?=\.?[0-9])[0-9_]*\.?[0-9_]*[eE][-+]?[0-9]+")


class Scalar(NamedTuple):
    """A scalar of a YAML document: its dotted key, and whether that key holds text."""

    name: str
    node: yaml.ScalarNode
    is_text: bool


def is_text_key(name: str) -> bool:
    """True if a scalar of the dotted key `name`, such as `run.name`, is text or null."""
    hint = _hint_of(name)
    return hint is not None and _is_text(hint)


def takes_list(name: str) -> bool:
    """True if the key may hold a list of texts, as `model.freeze` does."""
    hint = _hint_of(name)
    return hint is not None and _item_hint(hint) is not None


def keep_text(document: yaml.Node | None, name: str = "") -> bool:
    """Mark every plain scalar of a text key as text, in place; `name` is the key that `document` stands for.

    Returns whether any was marked. Raises `ConfigError` for a number elsewhere that is another than it looks like.
    """
    is_changed = False
    for scalar in _scalars(document, name):
        node = scalar.node
        if node.style is not None:  # quoted
            continue
        if not scalar.is_text:
            refuse_misread_number(scalar.name, node.value)
        elif node.value not in NULLS:
            node.tag, node.style = STRING_TAG, "'"
            is_changed = True
    return is_changed


def refuse_misread_number(name: str, text: str) -> None:
    """Raise `ConfigError` for a plain scalar that YAML reads as another number than a person does."""
    advice = "put text in quotes, and write a number as it is"
    if OCTAL.fullmatch(text):
        octal = int(text.replace("_", ""), 8)
        raise ConfigError(
            name, f"{text} begins with 0, and YAML reads it as {octal}; {advice}"
        )
    if SEXAGESIMAL.fullmatch(text):
        raise ConfigError(
            name, f"{text} is a number to the base of 60 in YAML; {advice}"
        )
    if EXPONENT.fullmatch(text):
        number = float(text.replace("_", ""))
        has_digits = bool(re.search("[1-9]", text.lower().partition("e")[0]))
        if math.isinf(number) or (number == 0 and has_digits):
            raise ConfigError(
                name, f"{text} is too large or too small for a number; {advice}"
            )


def typed_text(text: str) -> str | None:
    """The value of a text key as the command line gives it; None for null.

    The text as typed, unless it is quoted for YAML from end to end, as W&B's and our own sweeps may write it.
    """
    if text in NULLS:
        return None
    if text[0] in "'\"" and text[-1] == text[0]:
        try:
            node = yaml.compose(text, yaml.SafeLoader)
        except yaml.YAMLError:
            return text
        if isinstance(node, yaml.ScalarNode) and node.end_mark.index == len(text):
            value: str = node.value
            return value
    return text


def serialize(node: yaml.Node) -> str:
    """A node as YAML in one line, what was marked as text in quotes."""
    text: str = yaml.serialize(
        node, Dumper=yaml.SafeDumper, width=math.inf, allow_unicode=True
    )
    return text


def _scalars(node: yaml.Node | None, name: str) -> Iterator[Scalar]:
    """Every scalar value of a document, with its place."""
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            yield from _scalars(value_node, f"{name}.{key_node.value}".lstrip("."))
    elif isinstance(node, yaml.SequenceNode):
        for index, item_node in enumerate(node.value):
            yield from _scalars(item_node, f"{name}[{index}]")
    elif isinstance(node, yaml.ScalarNode):
        yield Scalar(name, node, is_text_key(name))


def _hint_of(name: str) -> Any:
    """The type of a dotted key, of a list's item for `wandb.tags[0]`; None for what no section declares."""
    section, _, rest = name.partition(".")
    list_name = section.partition("[")[0]
    if list_name != section and list_name in LISTS:
        item = declared_keys(LISTS[list_name]).get(rest)
        return None if item is None else item.hint
    if section not in SECTIONS:
        return None
    cls = SECTIONS[section]
    if key_of_set(name):
        cls, rest = EvaluationSetConfig, key_of_set(name)
    key, bracket, after = rest.partition("[")
    item = declared_keys(cls).get(key)
    if item is None:
        return None
    if not bracket:
        return item.hint
    # Lists of mappings: a transform's `name` is text, as is the pattern of a group of parameters.
    if after.endswith("].name") and key.endswith("transforms"):
        return str
    if after.endswith("].match") and key == "groups":
        return str
    return _item_hint(item.hint) if after.endswith("]") else None


def _is_text(hint: Any) -> bool:
    """True for a type that takes text, and, of scalars, nothing else but null."""
    if hint is str:
        return True
    if get_origin(hint) is Literal:
        return all(isinstance(choice, str) for choice in get_args(hint))
    if is_union(hint):
        members = [member for member in get_args(hint) if member is not type(None)]
        scalars = [member for member in members if get_origin(member) is not list]
        return bool(scalars) and all(_is_text(member) for member in scalars)
    return False


def _item_hint(hint: Any) -> Any:
    """`str` if the type is, or may be, a list of texts; else None."""
    members = get_args(hint) if is_union(hint) else (hint,)
    return str if list[str] in members else None
