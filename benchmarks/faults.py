"""Faults injected into real runs: does each still end with the undisturbed run's bits, or say what is wrong?

python -m benchmarks.faults --minutes 10                as many faults as fit, of every kind
python -m benchmarks.faults --cases 8 --seed 3          so many
python -m benchmarks.faults --minutes 30 --save docs/results/faults.md

A case is a bitwise run of digits that one fault befalls, on 1 or 2 processes, and that is then started again with
run.resume=auto until it ends. A fault is a signal at a random time, a SIGKILL or a full disk at one of its file
operations, or damage to a file between two starts. The exit status is 1 after a traceback, a hang or other bits.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

from benchmarks.processes import free_port, rank_variables
from benchmarks.step_time import machine

ROOT = Path(__file__).parents[1]
PATIENCE = 120.0  # seconds for a run to end, before it counts as a hang
STARTS = 4  # of one run; a fault befalls the first alone
OPERATIONS = 60  # more than a run's file operations
HASHED = ("weights_sha256", "buffers_sha256", "optimizer_sha256")
SETTINGS = (
    "run.reproducibility=bitwise",
    "run.resume=auto",
    "run.figures=false",
    "batch.size=200",
    "batch.micro_size=25",
    "model.width=8",
    "train.epochs=3",
    "train.checkpoint_every=3",
    "train.log_every=2",
    "wandb.mode=disabled",
)
OUTCOMES = ("survived", "refused", "traceback", "hang", "wrong")


@dataclass
class Case:
    """One run and its fault. `start` starts the run for the first time, `disturb` comes after that start ended."""

    kind: str
    detail: str
    program: Sequence[str] = ("train.py",)
    disturb: Callable[[Path], None] | None = None
    signal_number: int | None = None
    to_one_rank: bool = False
    after: float = 0.0  # seconds from the first checkpoint to the signal


def random_case(draw: random.Random) -> Case:
    """A fault of any kind."""
    make = draw.choice([signal_case, operation_case, damage_case])
    return make(draw)


def signal_case(draw: random.Random) -> Case:
    number = draw.choice(
        [signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGKILL]
    )
    to_one_rank = draw.random() < 0.5
    after = draw.uniform(0.0, 1.0)
    place = "one rank" if to_one_rank else "all ranks"
    return Case(
        f"signal {number.name}",
        f"to {place} after {after:.2f} s",
        signal_number=number,
        to_one_rank=to_one_rank,
        after=after,
    )


def operation_case(draw: random.Random) -> Case:
    kind = draw.choice(["kill", "full"])
    number = draw.randrange(1, OPERATIONS)
    names = {"kill": "SIGKILL at a file operation", "full": "full disk"}
    return Case(
        names[kind],
        f"operation {number}",
        program=("-m", "benchmarks.fault_program", kind, str(number)),
    )


def damage_case(draw: random.Random) -> Case:
    """A stop half-way, after which a random file of the run is damaged."""
    damage = draw.choice(["flip", "cut", "remove"])
    seed = draw.random()

    def disturb(run: Path) -> None:
        again = random.Random(seed)
        files = sorted(
            path for path in run.rglob("*") if path.is_file() and path.stat().st_size
        )
        damage_file(again.choice(files), damage, again)

    return Case(
        f"damage: {damage}",
        "to a file of the run",
        disturb=disturb,
        signal_number=signal.SIGTERM,
        after=draw.uniform(0.0, 0.6),
    )


def damage_file(path: Path, damage: str, draw: random.Random) -> None:
    """Flip one bit of a file, cut it short, or remove it."""
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: draw.randrange(len(content))])
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)


# ---------------------------------------------------------------- one case


@dataclass
class End:
    """How the processes of one start ended."""

    status: int
    errors: str
    hung: bool = False


def run_case(
    case: Case, directory: Path, expected: dict[str, str], draw: random.Random
) -> tuple[str, str]:
    """The outcome of a case, one of `OUTCOMES`, and what it said last."""
    said: list[str] = []
    for start in range(STARTS):
        program = case.program if start == 0 else ("train.py",)
        end = run(
            program,
            directory,
            processes=draw.choice([1, 2]),
            case=case if start == 0 else None,
        )
        said.append(end.errors)
        if end.hung:
            return "hang", end.errors
        if "Traceback" in end.errors:
            return "traceback", end.errors
        if end.status == 0:
            is_equal = hashes(directory) == expected
            return ("survived", "") if is_equal else ("wrong", end.errors)
        if start == 0 and case.disturb is not None:
            case.disturb(directory / "digits")
    # Started again and again, it is refused each time: with one message, or it is a defect.
    message = said[-1].strip()
    is_one_message = message.startswith("error: ") and message.count("error: ") == 1
    return ("refused" if is_one_message else "traceback"), message


def run(
    program: Sequence[str], directory: Path, *, processes: int, case: Case | None
) -> End:
    """Start the run, do to it what `case` says, and wait for its end."""
    port = free_port()
    errors = directory / "stderr"
    command = [sys.executable, *program, f"run.dir={directory}", *SETTINGS]
    with errors.open("w") as file:
        ranks = []
        for rank in range(processes):
            environment = rank_environment(rank, processes, port)
            ranks.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=file,
                )
            )
        try:
            if case is not None and case.signal_number is not None:
                send_signal(case, ranks, directory)
            hung = not wait(ranks)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
    statuses = [process.returncode for process in ranks]
    failed = next((status for status in statuses if status), 0)
    return End(failed, errors.read_text(), hung)


def rank_environment(rank: int, processes: int, port: int) -> dict[str, str]:
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    if processes == 1:
        return environment
    return environment | rank_variables(rank, processes, port)


def send_signal(
    case: Case, ranks: Sequence[subprocess.Popen[bytes]], directory: Path
) -> None:
    """Send it some time after the first checkpoint, if the run has not ended by then."""
    deadline = time.monotonic() + PATIENCE
    pointer = directory / "digits" / "checkpoints" / "last"
    while not pointer.exists() and any(process.poll() is None for process in ranks):
        if time.monotonic() > deadline:
            return
        time.sleep(0.01)
    time.sleep(case.after)
    assert case.signal_number is not None
    for process in ranks[-1:] if case.to_one_rank else ranks:
        process.send_signal(case.signal_number)


def wait(ranks: Sequence[subprocess.Popen[bytes]]) -> bool:
    """Wait for all ranks. As a launcher does, end the others soon after one was killed. False for a hang."""
    deadline = time.monotonic() + PATIENCE
    while any(process.poll() is None for process in ranks):
        if time.monotonic() > deadline:
            return False
        if any((process.poll() or 0) == -signal.SIGKILL for process in ranks):
            time.sleep(1.0)
            for process in ranks:
                process.kill()
        time.sleep(0.02)
    return True


def hashes(directory: Path) -> dict[str, str]:
    summary = json.loads((directory / "digits" / "summary.json").read_text())
    return {name: summary[name] for name in HASHED}


# ---------------------------------------------------------------- the campaign


def campaign(
    *, minutes: float, cases: int | None, seed: int, console: Console
) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Counts by kind and outcome, and a line for each case that is not survived."""
    draw = random.Random(seed)
    deadline = time.monotonic() + 60 * minutes
    counts: Counter[tuple[str, str]] = Counter()
    lines: list[str] = []
    with TemporaryDirectory() as scratch:
        undisturbed = Path(scratch, "undisturbed")
        undisturbed.mkdir()
        end = run(("train.py",), undisturbed, processes=1, case=None)
        if end.status:
            raise SystemExit(f"the undisturbed run failed: {end.errors}")
        expected = hashes(undisturbed)
        number = 0
        while (cases is None and time.monotonic() < deadline) or number < (cases or 0):
            number += 1
            case = random_case(draw)
            directory = Path(scratch, str(number))
            directory.mkdir()
            outcome, said = run_case(case, directory, expected, draw)
            counts[case.kind, outcome] += 1
            console.print(
                f"{number} {case.kind}, {case.detail}: {outcome}", highlight=False
            )
            if outcome != "survived":
                lines.append(
                    f"{outcome}: {case.kind}, {case.detail}: {said.strip()[-1000:]}"
                )
    return counts, lines


def report(counts: Counter[tuple[str, str]]) -> list[list[str]]:
    """A row for each kind: how many were injected, and how many had each outcome."""
    kinds = sorted({kind for kind, _ in counts})
    rows = []
    for kind in [*kinds, "all"]:
        values = []
        for outcome in OUTCOMES:
            values.append(
                sum(
                    n
                    for (k, o), n in counts.items()
                    if o == outcome and kind in (k, "all")
                )
            )
        rows.append([kind, str(sum(values)), *map(str, values)])
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument(
        "--cases", type=int, help="so many cases, however long they take"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, metavar="FILE.md")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    counts, lines = campaign(
        minutes=options.minutes, cases=options.cases, seed=options.seed, console=console
    )
    headings = ["fault", "injected", *OUTCOMES]
    table = Table(*headings)
    rows = report(counts)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    for line in lines:
        console.print(line, markup=False, highlight=False)
    if options.save is not None:
        options.save.write_text(as_markdown(headings, rows, options.seed))
    bad = sum(
        n
        for (_, outcome), n in counts.items()
        if outcome in ("traceback", "hang", "wrong")
    )
    return int(bad > 0)


def as_markdown(
    headings: Sequence[str], rows: Sequence[Sequence[str]], seed: int
) -> str:
    lines = [
        f"# Injected faults\n\n`python -m benchmarks.faults --seed {seed}`, {machine(1)}\n"
    ]
    lines.append("| " + " | ".join(headings) + " |")
    lines.append("|---" + "|--:" * (len(headings) - 1) + "|")
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
