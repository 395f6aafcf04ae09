"""The tables that `replay` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from trainer.inspection.replay import Replay, loss_rank

MOST_ROWS = 12  # of a table

Row = Mapping[str, Any]


def print_replay(result: Replay, run: Path, directory: Path) -> None:
    """Print whether the step is the one that the run trained, and what it looked like inside."""
    console = Console(highlight=False)
    for title, text in [*_facts(result, run), ("digest", _compare_digests(result))]:
        console.print(f"[dim]{title:<10}[/] {text}")
    console.print(_table("samples, largest loss first", sorted(result.samples, key=loss_rank)))
    console.print(_table("layers' outputs", _rows("layer", result.layers)))
    if result.batch_norm:
        title = "BatchNorm's statistics of one channel in one micro-batch"
        console.print(_table(title, _rows("layer", result.batch_norm)))
    console.print(_table("weights", _rows("parameter", result.weights)))
    console.print(f"[dim]files     [/] {directory}: replay.json has every row of these tables")


def _facts(result: Replay, run: Path) -> list[tuple[str, str]]:
    start = f"from the checkpoint of step {result.began_after}" if result.began_after else "from the run's beginning"
    facts = [("replay", f"{run}, step {result.step} in epoch {result.epoch}, {start}")]
    if result.step != result.asked:
        facts.append(("", f"step {result.asked} was asked for; the loss is not finite already in step {result.step}"))
    numbers = f"loss {result.loss:.6g} · lr {result.learning_rate:g} · gradient norm {result.grad_norm:.6g}"
    facts.append(("step", numbers))
    for name, (before, now) in result.logged.items():
        comparison = "the same now" if before == now else f"and now {now!r}"
        facts.append(("logged", f"{name} {before!r}, {comparison}"))
    return facts


def _compare_digests(result: Replay) -> str:
    """Whether the weights are those of the run, at the steps where the run logged a digest of them."""
    if not result.digests:
        return "the run logged none between the checkpoint and this step"
    for step, (before, now) in result.digests.items():
        if before != now:
            return (
                f"differs from the run's at step {step}: {before}, and now {now}; equal bits on another number "
                f"of processes need run.reproducibility=bitwise"
            )
    steps = len(result.digests)
    last = "this step's too" if result.step in result.digests else f"the last of them step {max(result.digests)}"
    return f"the same as the run's at all {steps} logged steps on the way, {last}"


def _rows(heading: str, numbers: Mapping[str, Row]) -> list[Row]:
    """Rows that begin with their name, in a column `heading`."""
    return [{heading: name, **row} for name, row in numbers.items()]


def _table(title: str, rows: Sequence[Row]) -> Table:
    """The first rows, numbers aligned right."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold", pad_edge=False)
    names: dict[str, None] = {}  # the keys of all rows, in order
    for row in rows:
        names.update(dict.fromkeys(row))
    for name in names:
        is_number = all(isinstance(row.get(name, 0), int | float) for row in rows)
        table.add_column(name.replace("_", " "), justify="right" if is_number else "left", overflow="fold")
    for row in rows[:MOST_ROWS]:
        table.add_row(*[_format(row.get(name)) for name in names])
    if len(rows) > MOST_ROWS:
        table.caption = f"{len(rows) - MOST_ROWS} more in replay.json"
    return table


def _format(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
