"""The list of benchmarks, and how `python -m benchmarks` runs one."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Benchmark:
    """`benchmarks.NAME`, which prints Markdown. `quick` are the arguments for a first look.

    `needs_data`: its first argument is a folder of images, which the user names.
    """

    name: str
    question: str
    quick: Sequence[str] = ("--quick",)
    needs_data: bool = False

    @property
    def module(self) -> str:
        return f"benchmarks.{self.name}"

    @property
    def is_here(self) -> bool:
        place = ROOT / "benchmarks" / self.name
        return place.is_dir() or place.with_suffix(".py").exists()

    def arguments(self, *, quick: bool, data: str | None) -> list[str]:
        """What its program is given; `data` is the folder of images, if the user has named one."""
        given = [data] if self.needs_data and data else []
        return [*given, *(self.quick if quick else ())]


BENCHMARKS = (
    Benchmark("start", "what does `--help` take, and how soon is the first step?"),
    Benchmark("where", "where does the time of a step go?"),
    Benchmark(
        "step_time", "what does a step cost over a raw loop's?", ("--rounds", "6")
    ),
    Benchmark("peers", "and beside other trainers, on one process and on two?"),
    Benchmark("fuse", "what do several micro-batches at once gain?", ("--rounds", "3")),
    Benchmark("bitwise_time", "what does bitwise cost?", ("--rounds", "3")),
    Benchmark("memory", "what does it hold in memory at most, over a raw loop?"),
    Benchmark("evaluation", "what does an evaluation cost?"),
    Benchmark("input", "how fast are images read and transformed?"),
    Benchmark("input_cache", "and from a cache of decoded images?"),
    Benchmark("batch_transforms", "and as whole micro-batches?", ("--rounds", "3")),
    Benchmark("checkpoint", "how long does a checkpoint stop the training?"),
    Benchmark(
        "transfer",
        "transfer learning beside a tutorial's script",
        ("--epochs", "1"),
        needs_data=True,
    ),
    Benchmark(
        "wandb_cost",
        "what does W&B cost?",
        ("--rounds", "1", "--epochs", "3"),
    ),
    Benchmark("scale", "is it the same run on 1 to 8 processes?"),
    Benchmark("faults", "what becomes of faults?", ("--minutes", "0.5")),
)


@dataclass(frozen=True)
class Result:
    """What a benchmark printed. `status` is its exit status, None if it was left out, for the reason in `text`."""

    benchmark: Benchmark
    arguments: Sequence[str]
    status: int | None
    seconds: float
    text: str

    @property
    def command(self) -> str:
        return " ".join(["python -m", self.benchmark.module, *self.arguments])

    @property
    def verdict(self) -> str:
        if self.status is None:
            return f"left out: {self.text}"
        return "done" if self.status == 0 else f"FAILED, exit status {self.status}"


def run(benchmark: Benchmark, *, quick: bool, data: str | None) -> Result:
    """Run it in a process of its own; what it says on stderr is shown as it comes."""
    arguments = benchmark.arguments(quick=quick, data=data)
    if not benchmark.is_here:
        return Result(benchmark, arguments, None, 0.0, "it is not in this checkout")
    if benchmark.needs_data and data is None:
        reason = "--data names no folder of images"
        return Result(benchmark, arguments, None, 0.0, reason)
    began = time.perf_counter()
    program = [sys.executable, "-m", benchmark.module, *arguments]
    ended = subprocess.run(
        program, check=False, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    seconds = time.perf_counter() - began
    return Result(benchmark, arguments, ended.returncode, seconds, ended.stdout.strip())


def page(results: Sequence[Result], machine: str) -> str:
    """One Markdown page: a line for each benchmark, then what each printed, a heading level down."""
    lines = ["# Benchmarks", "", machine, "", "| benchmark | question | s | |"]
    lines.append("|---|---|--:|---|")
    for result in results:
        name, question = result.benchmark.name, result.benchmark.question
        lines.append(
            f"| {name} | {question} | {result.seconds:.0f} | {result.verdict} |"
        )
    for result in results:
        if result.status is not None:
            lines += ["", f"## {result.benchmark.name}", "", f"`{result.command}`", ""]
            lines += [_one_level_down(line) for line in result.text.splitlines()]
    return "\n".join(lines) + "\n"


def _one_level_down(line: str) -> str:
    """A page's own headings stand below the benchmark's."""
    is_heading = line.startswith(("# ", "## "))
    return f"##{line}" if is_heading else line
