"""Faults injected into real runs: does each still end with the undisturbed run's bits, or say what is wrong?

python -m benchmarks.faults --minutes 10                as many faults as fit, of every kind
python -m benchmarks.faults --cases 30 --seed 3         so many
python -m benchmarks.faults --minutes 30 --save docs/results/faults.md

A case is a bitwise run on 1 or 2 processes that one fault befalls, and that is then started again with run.resume=auto
until it ends. It survives with the hashes of the undisturbed run, or is refused in one sentence. The exit status is 1
after a traceback, a hang or other bits.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

# Of every process that is forked from the server.
os.environ["OMP_NUM_THREADS"] = "1"

from rich.console import Console
from rich.table import Table

from benchmarks.faults.campaign import KINDS, OUTCOMES, Campaign, Result

HEADINGS = ("fault", "injected", *OUTCOMES)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--cases", type=int, help="so many, however long they take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--save", type=Path, metavar="FILE.md")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)

    def tell(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    with TemporaryDirectory() as scratch:
        campaign = Campaign(
            Path(scratch),
            seed=options.seed,
            jobs=options.jobs,
            kinds=options.kinds,
            tell=tell,
        )
        result = campaign.run(minutes=options.minutes, cases=options.cases)
    table = Table()
    for heading in HEADINGS:
        table.add_column(heading, no_wrap=True)
    for row in result.rows():
        table.add_row(*row)
    Console(width=100).print(table)
    for line in result.lines:
        tell(line)
    if options.save is not None:
        options.save.write_text(as_markdown(result, command(options)))
    return int(result.bad() > 0)


def command(options: argparse.Namespace) -> str:
    """What runs this campaign again, without where its page goes."""
    words = f"python -m benchmarks.faults --seed {options.seed} --jobs {options.jobs}"
    if options.cases is None:
        words += f" --minutes {options.minutes:g}"
    else:
        words += f" --cases {options.cases}"
    if options.kinds != list(KINDS):
        words += f" --kinds {shlex.join(options.kinds)}"
    return words


def as_markdown(result: Result, shown_command: str) -> str:
    """The page for docs/results."""
    from benchmarks.step_time import machine

    lines = [
        "# Injected faults",
        "",
        f"`{shown_command}`: {result.seconds / 60:.0f} minutes. {machine(1)}.",
        "",
        "*Survived*: started again with `run.resume=auto`, the run ended with the SHA-256 of weights, buffers and",
        "optimizer state of the undisturbed run. *Refused*: one sentence said what is wrong, each time.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|---" + "|--:" * (len(HEADINGS) - 1) + "|",
    ]
    lines += ["| " + " | ".join(row) + " |" for row in result.rows()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
