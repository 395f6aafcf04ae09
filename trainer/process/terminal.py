"""Whether text goes to a terminal."""

from __future__ import annotations


def is_terminal(stream: object) -> bool:
    """False also where a program has something else for `sys.stdout`: None, as in a service, or what only writes."""
    isatty = getattr(stream, "isatty", None)
    return isatty is not None and bool(isatty())
