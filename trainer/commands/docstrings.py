"""What a docstring says of a component and of its arguments, in short and without markup.

Read are sections `Args:` as Google, torch, timm and transformers write them: `name (type, optional): description`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

SECTION = re.compile(r"^(Args|Arguments|Parameters|Params|Keyword Args):?$")
ARGUMENT = re.compile(r"^\*{0,2}(\w+)\s*(?:\((.*?)\))?\s*:(?:\s+(.*))?$")
# The class that takes what a function passes on as **kwargs.
PASSED_ON_TO = re.compile(r"``(\w+(?:\.\w+)+)``")
MARKUP = (
    (re.compile(r":\w+:`~?(?:[\w.]+\.)?([^`]*)`"), r"\1"),  # :class:`~a.b.C`
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`_{0,2}"), r"\1"),  # `text <link>`_
    (re.compile(r"`+([^`]*)`+_{0,2}"), r"\1"),
    (re.compile(r"\*(optional)\*"), r"\1"),
)
# Which is shown beside the name.
DEFAULT = re.compile(
    r"\s*(?:\(default: (?:[^()]|\([^()]*\))*\)|\bDefault(?: is|:) \S+?)\.?$", re.I
)
MAX_LETTERS = 240  # of a description


class ArgumentNote(NamedTuple):
    """What a docstring says of one argument: its type, if any, and what it is for."""

    type: str
    text: str


def summary(target: Callable[..., Any], *, whole: bool) -> str:
    """The first paragraph of the target's docstring; with `whole` all of them before `Args:`."""
    paragraphs: list[str] = []
    for paragraph in re.split(r"\n\s*\n", _docstring(target)):
        first_line = paragraph.strip().partition("\n")[0]
        if SECTION.match(first_line) or first_line.startswith((".. ", ">>> ")):
            break
        paragraphs.append(plain(paragraph))
    return "\n".join(paragraphs if whole else paragraphs[:1])


def argument_notes(target: Callable[..., Any]) -> dict[str, ArgumentNote]:
    """What the docstrings of a function, or of a class and its constructor, say of each argument."""
    notes: dict[str, ArgumentNote] = {}
    sources = [target, getattr(target, "__init__", None)]
    for source in sources if inspect.isclass(target) else sources[:1]:
        for name, text in _argument_texts(_docstring(source)).items():
            head = ARGUMENT.match(text[0])
            assert head is not None
            lines = [head[3] or "", *text[1:]]
            notes[name] = ArgumentNote(_type(head[2] or ""), " ".join(lines))
    return notes


def passed_on_to(target: Callable[..., Any]) -> str | None:
    """The import path of what a function passes `**kwargs` on to, if its docstring says so."""
    note = argument_notes(target).get("kwargs")
    match = None if note is None else PASSED_ON_TO.search(note.text)
    return None if match is None else match[1]


def plain(text: str) -> str:
    """Text in one line, without markup, of a few sentences at most."""
    text = " ".join(text.split())
    for pattern, replacement in MARKUP:
        text = pattern.sub(replacement, text)
    text = DEFAULT.sub("", text)
    if len(text) <= MAX_LETTERS:
        return text
    start = text[:MAX_LETTERS]
    end = start.rfind(". ") + 1
    return start[:end] if end else f"{start.rpartition(' ')[0]} …"


def _docstring(source: Any) -> str:
    return inspect.cleandoc(getattr(source, "__doc__", None) or "")


def _argument_texts(docstring: str) -> dict[str, list[str]]:
    """The lines on each argument, from `Args:` to the next line that is not indented."""
    texts: dict[str, list[str]] = {}
    section_indent: int | None = None
    argument_indent: int | None = None
    lines: list[str] = []
    for line in docstring.splitlines():
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        if SECTION.match(stripped):
            section_indent, argument_indent, lines = indent, None, []
        elif section_indent is None or not stripped:
            continue
        elif indent <= section_indent:
            section_indent = None
        elif match := _argument_at(argument_indent, indent, stripped):
            argument_indent = indent
            lines = texts.setdefault(match[1], [stripped])
        elif indent > (argument_indent or 0):
            lines.append(stripped)
    return texts


def _argument_at(
    argument_indent: int | None, indent: int, text: str
) -> re.Match[str] | None:
    """The name with which an argument's text begins; None for a line that continues another's."""
    is_first = argument_indent is None or indent == argument_indent
    return ARGUMENT.match(text) if is_first else None


def _type(text: str) -> str:
    """`float` of `(float, optional, default 1)`."""
    parts = re.split(r",\s*\*?(?:optional|default)", plain(text))
    return "" if parts[0] in ("optional", "*optional*") else parts[0]
