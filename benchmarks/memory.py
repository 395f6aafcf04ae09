"""Peak memory on the CPU: Lockstep's `fit` beside the loop by hand, on the same net and data.

python -m benchmarks.memory                             about two minutes
python -m benchmarks.memory --quick

Each loop trains in a process of its own, in turn with the others. *Tensors* is the most memory that torch had allocated
for tensors at once while it trained, by torch's own profiler, in a run of its own. *Resident* is the most that the
process held, over what it held just before; libraries that are imported only then are in it. The data are in neither,
the net is. The proof, which is made before the first step where it does not take long, holds copies of weights and
gradients, so it is left out of one row and in the other. On the CPU `train.py` lets malloc keep freed memory, which a
raw loop can do as well: it is measured both ways. `python -m benchmarks.gpu --only memory-resnet18` asks a GPU.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

# Of torch's profiler, which otherwise reports on stderr that it begins and ends.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import numpy as np
import torch
from torch import nn

from benchmarks.loops import Work, raw
from benchmarks.page import page_parser, write_page
from benchmarks.processes import on_processes
from benchmarks.resnet import resnet18
from benchmarks.subjects import SGD, noise, settings
from benchmarks.timing import LOCKSTEP
from trainer import Trainer
from trainer.components.models import small_cnn
from trainer.data.datasets import ImageArrays
from trainer.process.exit import exit_process
from trainer.process.memory import keep_freed_memory
from trainer.process.ranks import Ranks

MIB = 2**20
STEPS = 6
RAW, BASE = "raw loop", "raw loop, freed memory kept"
PROVED = "Lockstep, the proof before it included"
LOOPS = (RAW, BASE, LOCKSTEP, PROVED)


class Subject(NamedTuple):
    """`batch` images of `side` × `side` a step, in one micro-batch."""

    name: str
    make_model: Callable[[], nn.Module]
    batch: int
    side: int


SUBJECTS = (
    Subject(
        "ResNet-18, 32 images of 96 × 96 a step",
        partial(resnet18, 10),
        batch=32,
        side=96,
    ),
    Subject(
        "small_cnn, 256 images of 32 × 32 a step",
        partial(small_cnn, 10, 3),
        batch=256,
        side=32,
    ),
)


def resident(subject: Subject, loop: str) -> float:
    """The most MiB that training added to this process's resident memory."""
    data = noise(STEPS * subject.batch, subject.side)
    begin = _reset_peak()
    train(subject, loop, data)
    return (_of_status("VmHWM") - begin) / MIB


def tensors(subject: Subject, loop: str) -> float:
    """The most MiB of tensors that training had allocated at once, beside its data."""
    data = noise(STEPS * subject.batch, subject.side)
    with torch.profiler.profile(profile_memory=True) as profile:
        train(subject, loop, data)
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [
        (event.start_ns(), event.nbytes())
        for event in events
        if event.name() == "[memory]"
    ]
    sizes = np.array([size for _, size in sorted(changes)])
    return float(sizes.cumsum().max()) / MIB


def train(subject: Subject, loop: str, data: ImageArrays) -> None:
    """`STEPS` steps of the loop."""
    if loop != RAW:
        keep_freed_memory("cpu")
    if loop in (LOCKSTEP, PROVED):
        changes: dict[str, object] = {"batch__size": subject.batch}
        if loop == LOCKSTEP:
            changes["run__proof"] = "off"
        with TemporaryDirectory() as directory:
            config = settings(Path(directory), **changes)
            Trainer(config, model=subject.make_model(), train_data=data).fit()
        return
    batch = subject.batch
    work = Work(subject.make_model, data, batch, batch, SGD, Ranks("fp32"))
    for _ in islice(raw(work), STEPS):
        pass


def _reset_peak() -> int:
    """Forget the process's peak so far; returns the bytes that it holds now."""
    with suppress(
        OSError
    ):  # where the system lacks it, the peak so far is lower anyway
        Path("/proc/self/clear_refs").write_text("5")
    return _of_status("VmRSS")


def _of_status(name: str) -> int:
    """Bytes, by the kernel's own account of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"the system says nothing of {name}")


def measure(subject: Subject, rounds: int) -> dict[str, tuple[float, list[float]]]:
    """MiB of each loop: of tensors, and resident once a round."""
    held: dict[str, list[float]] = {loop: [] for loop in LOOPS}
    for _ in range(rounds):
        for loop in LOOPS:
            held[loop] += on_processes(1, resident, subject, loop)
    found = {}
    for loop in LOOPS:
        [most] = on_processes(1, tensors, subject, loop)
        found[loop] = most, held[loop]
    return found


def table(found: Mapping[str, tuple[float, Sequence[float]]]) -> str:
    """Markdown: of resident memory the medians, the ratio of them, and the whole range."""
    base_tensors, base_held = found[BASE][0], float(np.median(found[BASE][1]))
    lines = ["| loop | tensors, MiB | × raw | resident, MiB | × raw | from, to |"]
    lines.append("|---|--:|--:|--:|--:|--:|")
    for loop, (of_tensors, held) in found.items():
        middle = float(np.median(held))
        cells = [loop, f"{of_tensors:.1f}", f"{of_tensors / base_tensors:.3f}"]
        cells += [f"{middle:.0f}", f"{middle / base_held:.2f}"]
        cells.append(f"{min(held):.0f}, {max(held):.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    parser = page_parser("memory", __doc__, rounds=5, quick="one round")
    options = parser.parse_args(arguments)
    rounds = 1 if options.quick else options.rounds
    sections = (
        f"## {subject.name}\n\n{table(measure(subject, rounds))}"
        for subject in SUBJECTS
    )
    return write_page("Peak memory", sections, options.save)


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
