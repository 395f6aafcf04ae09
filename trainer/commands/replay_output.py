"""The tables that `replay` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer.commands.tables import add_rows, make_table
from trainer.data.names import printable
from trainer.inspection.replay import Replay, loss_rank
from trainer.reporting.plain_text import plain_console

MOST_ROWS = 12  # of a table


def print_replay(result: Replay, run: Path, directory: Path) -> None:
    """Print whether the step is the one that the run trained, and what it looked like inside."""
    console = plain_console()
    for title, text in _facts(result, run):
        _print_fact(console, title, text)
    console.print(
        _table("samples, largest loss first", sorted(result.samples, key=loss_rank))
    )
    console.print(_table("layers' outputs", _named_rows("layer", result.layers)))
    if result.batch_norm:
        title = "BatchNorm's statistics of one channel in one micro-batch"
        console.print(_table(title, _named_rows("layer", result.batch_norm)))
    console.print(_table("weights", _named_rows("parameter", result.weights)))
    _print_fact(
        console, "files", f"{directory}: replay.json has every row of these tables"
    )


def _print_fact(console: Console, title: str, text: str) -> None:
    console.print(Text(f"{title:<10} ", "dim").append(text, "not dim"))


def _in_one_line(value: Any) -> Any:
    """A file's or a class's name without what a terminal would follow; a number as it is."""
    return printable(value) if isinstance(value, str) else value


def _facts(result: Replay, run: Path) -> list[tuple[str, str]]:
    start = "from the run's beginning"
    if result.began_after:
        start = f"from the checkpoint of step {result.began_after}"
    facts = [("replay", f"{run}, step {result.step} in epoch {result.epoch}, {start}")]
    if result.step != result.asked:
        facts.append(
            (
                "",
                f"step {result.asked} was asked for; the loss is not finite already in step {result.step}",
            )
        )
    numbers = f"loss {result.loss:.6g} · lr {result.learning_rate:g} · gradient norm {result.grad_norm:.6g}"
    facts.append(("step", numbers))
    for name, (before, now) in result.logged.items():
        comparison = "the same now" if before == now else f"and now {now!r}"
        facts.append(("logged", f"{name} {before!r}, {comparison}"))
    facts.append(("digest", _compare_digests(result)))
    return facts


def _compare_digests(result: Replay) -> str:
    """Whether the weights are those of the run, at the steps where the run logged a digest of them."""
    digests = result.digests
    if not digests:
        return "the run logged none between the checkpoint and this step"
    for step, (before, now) in digests.items():
        if before != now:
            return (
                f"differs from the run's at step {step}: {before}, and now {now}; equal bits on another number of "
                f"processes need run.reproducibility=bitwise"
            )
    last = (
        "this step's too"
        if result.step in digests
        else f"the last of them step {max(digests)}"
    )
    return (
        f"the same as the run's at all {len(digests)} logged steps on the way, {last}"
    )


def _named_rows(
    heading: str, numbers: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Rows that begin with their name, in a column `heading`."""
    return [{heading: name, **row} for name, row in numbers.items()]


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """The first rows, with a column for every key of any row."""
    columns: dict[str, None] = {}  # a dict, because it keeps their order
    for row in rows:
        columns.update(dict.fromkeys(row))
    text_columns = []
    for index, name in enumerate(columns):
        if any(isinstance(row.get(name), str) for row in rows):
            text_columns.append(index)
    table = make_table(
        [name.replace("_", " ") for name in columns],
        text_columns=text_columns,
        title=title,
    )
    for row in rows[:MOST_ROWS]:
        add_rows(table, [[_in_one_line(row.get(name)) for name in columns]])
    if len(rows) > MOST_ROWS:
        table.caption = f"{len(rows) - MOST_ROWS} more in replay.json"
    return table
