"""Runs the checks one after another, within the time, and reports each when it is done."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

import torch

from benchmarks.gpu.check import Answer, Check, Setting, Unanswered
from benchmarks.gpu.checks import check_named
from benchmarks.gpu.isolation import Failure, run_isolated
from benchmarks.gpu.report import Report, row_of
from trainer.process.machine import describe_rank

RESULTS = Path(__file__).parents[2] / "docs" / "results"
SECONDS_TO_DESCRIBE = 60.0
LINES_OF_LOG = 30


def run_checks(checks: list[Check], options: Namespace) -> int:
    """Run `checks` one after another, report each, and return the exit status."""
    deadline = monotonic() + 60 * options.minutes
    on_gpu = options.device != "cpu"
    if not on_gpu:
        # For the trainers, and the processes to come.
        os.environ["ACCELERATE_USE_CPU"] = "true"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with TemporaryDirectory() as directory:
        machine = _machine(options.device, Path(directory))
        if machine is None:
            print(
                "no CUDA GPU here: nothing is checked (--device cpu rehearses the checks on the CPU)"
            )
            return 0
        if not isinstance(machine, dict):
            print(f"the device cannot be used: {machine}", file=sys.stderr)
            return 2
        report = Report(
            machine,
            {"device": options.device, "quick": options.quick},
            options.output or (RESULTS if on_gpu else None),
        )
        print(", ".join(f"{name} {value}" for name, value in machine.items() if value))
        for check in checks:
            begin = monotonic()
            result = _result(check, options, Path(directory), deadline)
            row = row_of(check, result, monotonic() - begin, on_gpu=on_gpu)
            report.add(row)
            print(
                f"- {row.result} {row.name}: {row.text} ({row.seconds:.0f} s)",
                flush=True,
            )
            _show_log(result, Path(directory) / f"{check.name}.log")
    return _conclude(report)


def _result(check: Check, options: Namespace, directory: Path, deadline: float) -> Any:
    """The check's answer, or what it raised, or a `Failure`."""
    seconds_left = deadline - monotonic()
    if seconds_left <= 0:
        return Failure(f"not begun: the {options.minutes:g} minutes are over")
    setting = Setting(
        options.device, options.quick, directory / check.name, options.cifar10
    )
    setting.directory.mkdir()
    return run_isolated(
        _answer,
        check.name,
        setting,
        limit=min(check.limit, seconds_left),
        log=directory / f"{check.name}.log",
    )


def _answer(name: str, setting: Setting) -> Answer:
    if not setting.on_gpu:
        # Threads that spin beside other work make a rehearsal take minutes.
        torch.set_num_threads(1)
    torch.manual_seed(0)
    return check_named(name).answer(setting)


def _machine(device: str, directory: Path) -> Any:
    """What the report is about; None where there is no such device, an error or `Failure` where it cannot be used.

    Asked for in another process, so that this one holds no memory of the GPU.
    """
    return run_isolated(
        _describe, device, limit=SECONDS_TO_DESCRIBE, log=directory / "machine.log"
    )


def _describe(device_type: str) -> dict[str, Any] | None:
    if device_type == "cuda" and not torch.cuda.is_available():
        return None
    facts = describe_rank(torch.device(device_type), Path())
    names = ("device", "memory", "driver", "cuda", "cudnn", "nccl")
    packages = ("python", "torch", "torchvision", "accelerate")
    values = {name: facts.get(name) for name in (*names, *packages)}
    return {**values, "cores": os.cpu_count()}


def _show_log(result: Any, log: Path) -> None:
    """The end of what a failed check wrote, on stderr."""
    if isinstance(result, Answer | Unanswered) or not log.exists():
        return
    lines = log.read_text(errors="replace").splitlines()[-LINES_OF_LOG:]
    print("\n".join(f"    {line}" for line in lines), file=sys.stderr, flush=True)


def _conclude(report: Report) -> int:
    print(f"\n{report.summary()}")
    if report.directory is not None:
        print(f"written: {report.directory / report.stem}.md and .json")
    return int(any(row.breaks_promise for row in report.rows))
