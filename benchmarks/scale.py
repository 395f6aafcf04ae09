"""One run on any number of processes and loader workers, stopped or not, beside Accelerate's documented loop.

python -m benchmarks.scale                          all of it, about two minutes on two CPU cores
python -m benchmarks.scale --quick                  a few lines of each table, seconds
python -m benchmarks.scale --save docs/results/scale.md
python -m benchmarks.scale --json                   the same as one JSON object

The processes are real ones, joined by gloo, on the CPU. The exit status is 1 where runs that must be equal differ.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.scale_peers import BATCH, MICRO, Line, compare
from benchmarks.scale_runs import Outcome, cases, outcome, resume_seconds
from benchmarks.step_time import machine

SHOWN = 12  # hex digits of a digest


def outcomes(quick: bool) -> list[Outcome]:
    found = []
    for parts in cases(quick):
        with TemporaryDirectory() as directory:
            found.append(outcome(parts, Path(directory), quick))
    return found


def verdict(found: Sequence[Outcome]) -> tuple[bool, str]:
    """Whether every run left the first one's digests, in a sentence."""
    due = found[0].digests
    odd = [
        (i, [k for k in due if o.digests[k] != due[k]])
        for i, o in enumerate(found, 1)
        if o.digests != due
    ]
    if not odd:
        return True, f"All {len(found)} runs are equal, bit for bit."
    return False, "DIFFERENT from line 1: " + "; ".join(
        f"line {i} in its {', '.join(keys)}" for i, keys in odd
    )


def runs_table(found: Sequence[Outcome]) -> Table:
    digests = [f"{name} SHA-256" for name in found[0].digests]
    table = _table("", "run", *digests)
    for number, each in enumerate(found, 1):
        described = ", then ".join(part.describe() for part in each.parts)
        table.add_row(
            str(number),
            described,
            *(digest[:SHOWN] for digest in each.digests.values()),
        )
    return table


def peers_table(lines: Sequence[Line]) -> Table:
    table = _table(
        "loop",
        "processes × accumulated",
        "samples read, each epoch",
        "of them repeated",
        "steps of other samples",
        "gradient error, last step",
        "learning rate, each epoch's last step",
        "BatchNorm updates",
        "largest weight difference",
        "accuracy",
    )
    for line in lines:
        table.add_row(
            line.loop,
            line.layout,
            _each(line.read),
            _each(line.repeated),
            line.other_steps,
            f"{line.gradient_error:.1e}",
            _each(line.rates),
            str(line.batch_norm_updates),
            f"{line.weights_moved:.1e}" if line.weights_moved else "0",
            f"{line.accuracy:.3f}",
        )
    return table


def _each(values: Sequence[float]) -> str:
    return ", ".join(
        f"{value:g}" if isinstance(value, int) else f"{value:.0e}" for value in values
    )


def _table(*columns: str) -> Table:
    table = Table(box=box.MARKDOWN)
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few lines of each table"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object in place of the tables",
    )
    parser.add_argument(
        "--save", type=Path, help="write the tables to this Markdown file too"
    )
    options = parser.parse_args(arguments)
    console = Console(
        width=400, record=True, quiet=options.json, highlight=False, soft_wrap=True
    )
    began = monotonic()
    console.print(f"# The same run on any number of processes\n\n{machine(1)}\n")
    found = outcomes(options.quick)
    equal, sentence = verdict(found)
    console.print(
        "## run.reproducibility=bitwise: what each run left behind\n",
        runs_table(found),
        sentence,
        sep="\n",
    )
    samples, epochs = (BATCH * 2 + 31, 1) if options.quick else (1439, 2)
    lines = compare(samples, epochs, (1, 4) if options.quick else (1, 2, 4))
    console.print(
        f"\n## Beside the loop of Accelerate's guide: {BATCH} = processes × accumulated × {MICRO} samples a step\n",
        peers_table(lines),
        sep="\n",
    )
    with TemporaryDirectory() as directory:
        seconds = resume_seconds(Path(directory), 100_000)
    resumed = ", ".join(
        f"{value:.2f} s after step {step}" for step, value in seconds.items()
    )
    console.print(
        f"\nResumed in an epoch of 100,000 images, 1000 steps, the first step has ended: {resumed}."
    )
    console.print(f"{monotonic() - began:.0f} s in all.")
    if options.json:
        print(json.dumps(_plain(found, equal, lines, seconds), indent=2))
    if options.save:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        options.save.write_text(
            "\n".join(line.rstrip() for line in console.export_text().splitlines())
            + "\n"
        )
    return 0 if equal else 1


def _plain(
    found: Sequence[Outcome],
    equal: bool,
    lines: Sequence[Line],
    seconds: dict[int, float],
) -> dict[str, Any]:
    runs = [asdict(each) for each in found]
    return {
        "equal": equal,
        "runs": runs,
        "loops": [asdict(line) for line in lines],
        "resume_seconds": seconds,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
