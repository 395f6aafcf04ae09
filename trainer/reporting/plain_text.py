"""Text on a terminal by rich, unchanged."""

from __future__ import annotations

from rich.console import Console


def plain_console(*, stderr: bool = False, width: int | None = None) -> Console:
    """A console of rich that prints text as it is; styles come from `rich.text.Text` alone.

    Left alone, rich takes `[red]` for a style and `:warning:` for a picture, and either may be part of a name that a
    user gave to a file, a class or a metric.
    """
    return Console(
        stderr=stderr,
        width=width,
        markup=False,
        emoji=False,
        highlight=False,
        # In a notebook rich would draw HTML widgets.
        force_jupyter=False,
    )
