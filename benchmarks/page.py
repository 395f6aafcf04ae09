"""The program around a benchmark: its options, and a page of Markdown that is printed as it grows."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from benchmarks.step_time import machine
from trainer.process.exit import report_error


def page_parser(
    name: str, description: str | None, *, rounds: int, quick: str
) -> argparse.ArgumentParser:
    """The options of `python -m benchmarks.NAME`; `rounds` is the default, `quick` what --quick stands for."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=rounds,
        help=f"rounds of each way (default: {rounds})",
    )
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument(
        "--save", type=Path, metavar="FILE.md", help="write the page to this file, too"
    )
    return parser


def write_page(
    title: str, sections: Iterable[str], save: Path | None, *, threads: int = 1
) -> int:
    """Print each section once it is measured, and keep the page; returns the exit status."""
    text = [f"# {title}\n\n{machine(threads)}"]
    print(text[0], flush=True)
    try:
        for section in sections:
            print(f"\n{section}", flush=True)
            text.append(section)
    except Exception as error:
        return report_error(error)
    if save:
        save.parent.mkdir(parents=True, exist_ok=True)
        save.write_text("\n\n".join(text) + "\n")
    return 0
