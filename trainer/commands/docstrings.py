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
        first_line, _, _ = paragraph.strip().partition("\n")
        # A directive, or an example.
        if SECTION.match(first_line) or first_line.startswith((".. ", ">>> ")):
            break
        paragraphs.append(plain(paragraph))
    if not whole:
        paragraphs = paragraphs[:1]
    return "\n".join(paragraphs)


def argument_notes(target: Callable[..., Any]) -> dict[str, ArgumentNote]:
    """What the docstrings of a function, or of a class and its constructor, say of each argument."""
    notes: dict[str, ArgumentNote] = {}
    sources: list[Any] = [target]
    if inspect.isclass(target):
        sources.append(getattr(target, "__init__", None))
    for source in sources:
        texts = _argument_texts(_docstring(source))
        for name, (first_line, *others) in texts.items():
            head = ARGUMENT.match(first_line)
            assert head is not None
            _, type_text, description = head.groups(default="")
            text = " ".join([description, *others])
            notes[name] = ArgumentNote(_type(type_text), text)
    return notes


def passed_on_to(target: Callable[..., Any]) -> str | None:
    """The import path of what a function passes `**kwargs` on to, if its docstring says so."""
    note = argument_notes(target).get("kwargs")
    if note is None:
        return None
    match = PASSED_ON_TO.search(note.text)
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
    end_of_sentence = start.rfind(". ") + 1
    if end_of_sentence:
        return start[:end_of_sentence]
    whole_words, _, _ = start.rpartition(" ")
    return f"{whole_words} …"


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
            section_indent = indent
            argument_indent = None  # until the first argument shows it
            lines = []
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
    kind, *_ = re.split(r",\s*\*?(?:optional|default)", plain(text))
    if kind in ("optional", "*optional*"):
        return ""
    return kind
