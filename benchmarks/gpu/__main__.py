"""What only a GPU can show: each check in a process of its own, the results in a Markdown and a JSON file.

python -m benchmarks.gpu                            on one CUDA GPU, within 8 minutes
python -m benchmarks.gpu --list                     the checks
python -m benchmarks.gpu --only resume --only fp16  these alone
python -m benchmarks.gpu --quick                    smaller figures, in less time
python -m benchmarks.gpu --device cpu               a rehearsal without a GPU, on next to nothing

Needs no network. The exit status is 1 if a check of correctness failed, 2 if nothing can run. Where there is no CUDA
GPU, a line says so, and it is 0. docs/gpu-report.md says more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

# What every check imports, by the names of the packages to install. The rest is needed by some features only.
REQUIRED = {
    "torch": "torch",
    "accelerate": "accelerate",
    "numpy": "numpy",
    "psutil": "psutil",
    "rich": "rich",
    "safetensors": "safetensors",
    "yaml": "pyyaml",
}
MINUTES = 8.0


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    missing = [package for name, package in REQUIRED.items() if find_spec(name) is None]
    if missing:
        print(
            f"not installed, and nothing runs without: {', '.join(missing)}; docs/gpu-report.md says how to carry "
            f"packages to a machine without a network",
            file=sys.stderr,
        )
        return 2
    from benchmarks.gpu.checks import CHECKS
    from benchmarks.gpu.runner import run_checks

    names = [check.name for check in CHECKS]
    if unknown := [name for name in options.only if name not in names]:
        print(
            f"no such check: {', '.join(unknown)}; --list names them", file=sys.stderr
        )
        return 2
    checks = [
        check for check in CHECKS if not options.only or check.name in options.only
    ]
    if options.list:
        for check in checks:
            kind = "correctness" if check.is_correctness else "figure"
            print(f"{check.name:30} {kind:12} {check.question}")
        return 0
    return run_checks(checks, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--list", action="store_true", help="print the checks, and run none"
    )
    parser.add_argument(
        "--only",
        metavar="NAME",
        action="append",
        default=[],
        help="run this check; may be repeated (default: all)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="about a quarter of the work"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--minutes",
        type=float,
        default=MINUTES,
        help=f"start no check after these, and let none run on (default: {MINUTES:g})",
    )
    parser.add_argument(
        "--cifar10",
        type=Path,
        metavar="FOLDER",
        help="CIFAR-10's images, as data.root names them, or a folder with train/ and test/ (default: made-up images)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where to write the results (default: docs/results; of a rehearsal none are kept)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
