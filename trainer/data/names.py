"""Names of files and classes as text that is the same on every file system."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

from trainer.errors import DataError

IDEOGRAPHIC_SPACE = "\u3000"  # which Python does not count as printable


def normal_form(name: str) -> str:
    """A name in Unicode's composed form, NFC: file systems and archives may spell one "é" in two ways."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def sort_key(path: str) -> tuple[str, str]:
    """The order of paths, the same whatever order a file system lists them in, also of two that are spelt like one."""
    return normal_form(path), path


def printable(path: str | Path) -> str:
    """A path as text for a message of one line: escapes stand for bytes that are not UTF-8 and for control characters.

    A terminal would follow these, and a line end would make two messages of one.
    """
    text = os.fsencode(path).decode(errors="backslashreplace")
    if text.isprintable():
        return text
    characters = []
    for character in text:
        is_shown = character.isprintable() or character == IDEOGRAPHIC_SPACE
        characters.append(character if is_shown else _escape(character))
    return "".join(characters)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def check_utf8(path: str) -> None:
    """Raise `DataError` for a path whose bytes are not UTF-8: it could not be written to any of a run's files."""
    if path.isascii():
        return
    try:
        path.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{printable(path)} has a name that is not UTF-8; rename it, as convmv does for whole folders"
        ) from None
