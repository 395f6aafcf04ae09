"""All benchmarks, one after another, and one page of what they found.

python -m benchmarks                                     all, about half an hour on two cores
python -m benchmarks --quick                             the same with few rounds, a first look
python -m benchmarks step_time peers                     some
python -m benchmarks --data PATH                         with `transfer`, on a folder with train/ and val/
python -m benchmarks --list                              their names and what they ask
python -m benchmarks --save docs/results/all.md          the page elsewhere than in runs/benchmarks/

Each runs in a process of its own: `python -m benchmarks.NAME --help` says what it measures, and how. One that fails
does not stop the others; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from benchmarks.suite import BENCHMARKS, Benchmark, Result, page, run
from trainer.errors import ConfigError, nearest
from trainer.process.exit import report_error


def main(arguments: Sequence[str]) -> int:
    """Run those that are named, or all; returns the exit status."""
    options = _options(arguments)
    if options.list:
        for benchmark in BENCHMARKS:
            print(f"{benchmark.name:<18}{benchmark.question}")
        return 0
    try:
        chosen = _chosen(options.names)
        if options.data is not None and not Path(options.data).is_dir():
            raise ConfigError("--data", f"{options.data} is no folder")
    except ConfigError as error:
        return report_error(error)
    results: list[Result] = []
    for benchmark in chosen:
        print(f"{benchmark.name}: {benchmark.question}", file=sys.stderr, flush=True)
        result = run(benchmark, quick=options.quick, data=options.data)
        print(f"{result.text}\n", flush=True)
        results.append(result)
    return _close(results, options.save)


def _chosen(names: Sequence[str]) -> list[Benchmark]:
    known = {benchmark.name: benchmark for benchmark in BENCHMARKS}
    for name in names:
        if name not in known:
            hint = nearest(name, known)
            raise ConfigError(name, f"no such benchmark{hint}; --list names them")
    return [known[name] for name in names or known]


def _close(results: Sequence[Result], path: Path | None) -> int:
    """Write the page, and say of each how it ended."""
    from benchmarks.step_time import machine

    path = path or Path("runs", "benchmarks", f"{date.today()}.md")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(results, machine(1)))
    for result in results:
        print(f"{result.benchmark.name:<18}{result.seconds:5.0f} s  {result.verdict}")
    print(f"page              {path}")
    return int(any(result.status for result in results))


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which (default: all)")
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--data", metavar="PATH", help="a folder of images")
    parser.add_argument("--list", action="store_true", help="name them, and no more")
    parser.add_argument("--save", type=Path, metavar="FILE.md")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
