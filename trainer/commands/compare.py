"""See whether two runs are the same run, and where they first differ.

lockstep compare runs/a runs/b

Config, data, environment and every logged row are compared; checkpoints are not needed. The exit status is 1 if a
logged value differs, as with `diff`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.commands.arguments import CommandParser

if TYPE_CHECKING:
    from trainer.inspection.compare import Comparison

LONGEST_VALUE = 60  # characters; a longer one, a hash say, is cut to its first 16

Line = tuple[str, str]  # title, or "" to continue the one above, and text


def main(arguments: list[str]) -> int:
    """Print what differs between two run directories; returns the exit status."""
    parser = CommandParser("compare", __doc__)
    parser.add_argument(
        "first", metavar="RUN_A", type=Path, help="the directory of a run"
    )
    parser.add_argument(
        "second", metavar="RUN_B", type=Path, help="the directory of another"
    )
    options = parser.parse(arguments)

    from trainer.inspection.compare import compare

    comparison = compare(options.first, options.second)
    lines = [("runs", f"{options.first} | {options.second}")]
    lines += _settings(comparison)
    lines += _rows(comparison, options.first, options.second)
    for title, text in lines:
        print(f"{title:<12} {text}")
    return 0 if comparison.same else 1


def _settings(comparison: Comparison) -> list[Line]:
    """What differs in config, data and environment."""
    lines = _differences(
        "config", comparison.config, "the same in every key that changes a run"
    )
    if comparison.free:
        lines.append(("", f"free keys that differ: {', '.join(comparison.free)}"))
    lines += _differences("data", comparison.data, "the same samples")
    lines += _differences("environment", comparison.environment, "the same")
    return lines


def _differences(
    title: str, pairs: Mapping[str, tuple[Any, Any]], same: str
) -> list[Line]:
    if not pairs:
        return [(title, same)]
    lines = []
    for name, (first, second) in pairs.items():
        lines.append((title, f"{name}: {_shorten(first)} | {_shorten(second)}"))
        title = ""
    return lines


def _rows(comparison: Comparison, first: Path, second: Path) -> list[Line]:
    """How many logged rows were compared, and each column's first step that differs."""
    steps = comparison.steps
    if not steps:
        return [("rows", "none that both logged")]
    text = f"{len(steps)} logged steps compared, {steps[0]} to {steps[-1]}"
    for run, count in zip((first, second), comparison.steps_of_one, strict=True):
        if count:
            text += f"; {count} only in {run}"
    lines = [("rows", text)]
    if comparison.same:
        lines.append(
            ("", "every value and every digest of the weights is the same, bit for bit")
        )
    for column, (step, ours, theirs) in sorted(
        comparison.first_differences.items(), key=_first_step
    ):
        name, gap = "weights", ""
        if column != "digest":
            name, gap = (
                column,
                f"   at most {comparison.largest_differences[column]:.1e} apart, relative",
            )
        lines.append(("", f"from step {step:<6} {name:<20} {ours} | {theirs}{gap}"))
    return lines


def _first_step(item: tuple[str, tuple[int, Any, Any]]) -> int:
    return item[1][0]


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:16]}…"
