"""Whether two runs are the same run, and where they part."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.commands.arguments import split
from trainer.errors import ConfigError
from trainer.inspection.compare import Comparison, compare


def main(arguments: list[str]) -> int:
    """Compare two run directories; exit status 1 where a logged value differs, as `diff` has it."""
    given = split(arguments)
    if len(given.paths) != 2 or given.overrides:
        raise ConfigError("RUN_A RUN_B", "compare takes two run directories and nothing else")
    first, second = map(Path, given.paths)
    found = compare(first, second)
    for name, text in _lines(found, first, second):
        print(f"{name:<12} {text}")
    return 0 if found.same else 1


def _lines(found: Comparison, first: Path, second: Path) -> list[tuple[str, str]]:
    lines = [("runs", f"{first} | {second}")]
    lines += _differing("config", found.config, "the same in every key that changes a run")
    if found.free:
        lines.append(("", f"free keys that differ: {', '.join(found.free)}"))
    lines += _differing("data", found.data, "the same samples")
    lines += _differing("environment", found.environment, "the same")
    if not found.steps:
        return [*lines, ("rows", "none that both logged")]
    alone = "".join(f"; {n} only in {run}" for n, run in zip(found.only, (first, second), strict=True) if n)
    lines.append(("rows", f"{len(found.steps)} logged steps compared, {found.steps[0]} to {found.steps[-1]}{alone}"))
    if found.same:
        return [*lines, ("", "every value and every digest of the weights is the same, bit for bit")]
    for name, (step, ours, theirs) in sorted(found.parted.items(), key=lambda item: item[1][0]):
        shown = "weights" if name == "digest" else name
        apart = "" if name == "digest" else f"   at most {found.gaps[name]:.1e} apart, relative"
        lines.append(("", f"from step {step:<6} {shown:<20} {ours} | {theirs}{apart}"))
    return lines


def _differing(title: str, pairs: Mapping[str, tuple[Any, Any]], same: str) -> list[tuple[str, str]]:
    if not pairs:
        return [(title, same)]
    texts = [f"{name}: {_short(a)} | {_short(b)}" for name, (a, b) in pairs.items()]
    return [(title if number == 0 else "", text) for number, text in enumerate(texts)]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:16]}…"
