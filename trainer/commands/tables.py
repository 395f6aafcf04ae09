"""Tables of numbers, as `explain` and `replay` print them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

Row = Sequence[Any]  # text, numbers, or None for what there is not


def make_table(
    headings: Sequence[str],
    *,
    text_columns: Iterable[int] = (0,),
    title: str | None = None,
) -> Table:
    """An empty table. All columns but `text_columns` are aligned right, for numbers."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1),
    )
    texts = set(text_columns)
    for index, heading in enumerate(headings):
        table.add_column(
            heading, justify="left" if index in texts else "right", overflow="fold"
        )
    return table


def add_rows(table: Table, rows: Iterable[Row]) -> None:
    """Add rows, their numbers with four significant digits."""
    for row in rows:
        # As text: of a plain string rich would take parts in brackets, such as `x[copy].jpg` has, for styles.
        table.add_row(*[Text(format_cell(value)) for value in row])


def format_cell(value: Any) -> str:
    """Text as it is, a float with four significant digits, a dash for None."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
