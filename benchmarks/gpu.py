"""What only a GPU can show, each as a check with its figures. One that fails does not stop the others.

python -m benchmarks.gpu                            on one CUDA GPU, a few minutes
python -m benchmarks.gpu "peak memory" resume       these alone
python -m benchmarks.gpu --save docs/results/gpu.md
python -m benchmarks.gpu --device cpu               the same code on the CPU, less of it, to see that it runs

The exit status is 1 if a check failed. Where there is no CUDA GPU, a line says so, and it is 0.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

import torch

from benchmarks import gpu_checks as checks
from benchmarks.step_time import machine

CHECKS: dict[str, Callable[[torch.device, Path], checks.Verdict]] = {
    "step time of ResNet-18": checks.resnet_step_time,
    "step time of a tiny net": checks.tiny_step_time,
    "peak memory": checks.peak_memory,
    "host syncs": checks.host_syncs,
    "pixels": checks.pixels,
    "fp16": checks.fp16,
    "bf16": checks.bf16,
    "compile": checks.compiled,
    "two processes": checks.two_processes,
    "bitwise": checks.bitwise,
    "fused": checks.fused,
    "sync BatchNorm": checks.sync_batch_norm,
    "sync BatchNorm on two processes": checks.sync_on_two,
    "resume": checks.resume,
}
WORDS = {True: "PASS", False: "FAIL", None: "SKIP"}


def run_check(name: str, device: torch.device) -> checks.Verdict:
    """The check's verdict; an error of any kind is a failure, its traceback told on stderr."""
    try:
        with TemporaryDirectory() as directory, redirect_stdout(io.StringIO()):
            return CHECKS[name](device, Path(directory))
    except Exception as error:
        traceback.print_exc()
        last = (str(error).strip() or "no message").splitlines()[-1]
        return False, f"{type(error).__name__}: {last}"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checks",
        nargs="*",
        help=f"names of checks, among: {', '.join(CHECKS)} (default: all)",
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--save", type=Path, help="write the report to this Markdown file too"
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.checks) - set(CHECKS):
        parser.error(f"no such check: {', '.join(unknown)}")
    if options.device == "cpu":
        # For the trainers, and the processes to come.
        os.environ["ACCELERATE_USE_CPU"] = "true"
    elif not torch.cuda.is_available():
        print(
            "no CUDA GPU here: nothing is checked (--device cpu runs the same code on the CPU)"
        )
        return 0
    lines = [
        f"# Checks on {'a GPU' if options.device == 'cuda' else 'the CPU'}",
        machine(torch.get_num_threads()),
        "",
    ]
    print("\n\n".join(lines[:2]), end="\n\n", flush=True)
    failed = False
    for name in options.checks or CHECKS:
        began = monotonic()
        passed, figures = run_check(name, torch.device(options.device))
        failed = failed or passed is False
        lines.append(
            f"- {WORDS[passed]} **{name}**: {figures} ({monotonic() - began:.0f} s)"
        )
        print(lines[-1].replace("*", ""), flush=True)
    if options.save:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        options.save.write_text("\n".join([lines[0], "", *lines[1:]]) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
