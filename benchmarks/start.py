"""How soon a program answers: `--help` beside `import torch`, and the first step beside a raw script's.

python -m benchmarks.start                              about a minute
python -m benchmarks.start --quick

Each is a fresh interpreter, in turn with the others. The raw script imports torch, reads scikit-learn's digits and
makes one step of SGD; Lockstep's run has the config of digits, with all that it does before its first step, and what
it writes after it. Files are in the system's cache after a first round that does not count.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

from benchmarks.page import page_parser, write_page
from benchmarks.suite import ROOT

TORCH, SCRIPT = "import torch", "a raw script's first step"
RAW_SCRIPT = """\
import torch
from sklearn.datasets import load_digits
images, targets = load_digits(return_X_y=True)
inputs = torch.tensor(images[:64], dtype=torch.float32) / 16
model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
torch.nn.functional.cross_entropy(model(inputs), torch.tensor(targets[:64])).backward()
optimizer.step()
"""
Seconds = npt.NDArray[np.float64]  # (rounds, 2): on the wall, and of CPU time


def programs(directory: Path) -> dict[str, tuple[list[str], str]]:
    """Arguments of an interpreter, and the program that each is held against."""
    quiet = [f"run.dir={directory}", "run.figures=false", "wandb.mode=disabled"]
    return {
        TORCH: (["-c", "import torch"], TORCH),
        "train.py --help": (["train.py", "--help"], TORCH),
        "python -m trainer --help": (["-m", "trainer", "--help"], TORCH),
        "python -m trainer compare --help": (
            ["-m", "trainer", "compare", "--help"],
            TORCH,
        ),
        SCRIPT: (["-c", RAW_SCRIPT], SCRIPT),
        "train.py train.max_steps=1": (
            ["train.py", "train.max_steps=1", *quiet],
            SCRIPT,
        ),
        "python -m trainer check": (
            ["-m", "trainer", "check", "configs/digits.yaml", *quiet],
            SCRIPT,
        ),
    }


def run_once(arguments: Sequence[str], output: int) -> tuple[float, float]:
    """Seconds on the wall and of CPU time of an interpreter; raises `RuntimeError` if it fails."""
    began = os.times()
    process = os.posix_spawn(
        sys.executable,
        [sys.executable, *arguments],
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_DUP2, output, 1),
            (os.POSIX_SPAWN_DUP2, output, 2),
        ],
    )
    _, status, usage = os.wait4(process, 0)
    if status != 0:
        raise RuntimeError(f"python {' '.join(arguments)} failed")
    return os.times().elapsed - began.elapsed, usage.ru_utime + usage.ru_stime


def measure(rounds: int) -> dict[str, Seconds]:
    """Of each program, once a round, after a round that does not count."""
    spent: dict[str, list[tuple[float, float]]] = {}
    with TemporaryDirectory() as directory, Path(os.devnull).open("w") as nowhere:
        every = programs(Path(directory))
        for number in range(rounds + 1):
            for name, (arguments, _) in every.items():
                seconds = run_once(arguments, nowhere.fileno())
                if number:
                    spent.setdefault(name, []).append(seconds)
    return {name: np.array(of_rounds) for name, of_rounds in spent.items()}


def table(seconds: Mapping[str, Seconds]) -> str:
    """Markdown: medians, and ratios round by round with their whole range."""
    lines = [
        "| program | s | of CPU time | over | × | from, to | × CPU time |",
        "|---|--:|--:|---|--:|--:|--:|",
    ]
    for name, (_, base) in programs(Path()).items():
        wall, cpu = np.median(seconds[name], axis=0)
        ratios = seconds[name] / seconds[base]
        ratio, of_cpu = np.median(ratios, axis=0)
        low, high = ratios[:, 0].min(), ratios[:, 0].max()
        cells = [f"`{name}`", f"{wall:.2f}", f"{cpu:.2f}", base, f"{ratio:.2f}"]
        cells += [f"{low:.2f}, {high:.2f}", f"{of_cpu:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def sections(rounds: int) -> Iterator[str]:
    yield table(measure(rounds))


def main(arguments: Sequence[str]) -> int:
    parser = page_parser("start", __doc__, rounds=5, quick="two rounds")
    options = parser.parse_args(arguments)
    os.chdir(ROOT)
    rounds = 2 if options.quick else options.rounds
    threads = os.cpu_count() or 1
    return write_page("Starting", sections(rounds), options.save, threads=threads)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
