"""Where the time of a step goes: in the model, in autograd, in the optimizer, or in what the trainer does around them.

python -m benchmarks.where                              a minute
python -m benchmarks.where --quick

Lockstep's `fit` and the loop by hand take turns in one process, as in `benchmarks.step_time`: first to be timed, and
then once more under a timer that stops the process after each 5 ms of CPU time. The innermost function that belongs to
a part gets that sample, so the parts add up to the whole. A share of 1 % is a handful of samples: no more than a hint.
"""

from __future__ import annotations

import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import FrameType

import numpy as np

from benchmarks import loops
from benchmarks.page import page_parser, write_page
from benchmarks.step_time import Workload, measure, workloads
from benchmarks.timing import LOCKSTEP, Rounds

INTERVAL = 0.005  # seconds of CPU time
RAW = "raw"
# Parts of a step by what stands in the file name of the innermost function, the first that fits.
MODEL, BACKWARD, UPDATE = "model and loss", "backward", "optimizer's update"
LOADING, REST = "samples", "the rest"
PARTS = (
    ("/torch/autograd/", BACKWARD),
    ("/torch/optim/", UPDATE),
    ("/torch/utils/data/", LOADING),
    ("/torch/nn/", MODEL),
    ("/trainer/data/", LOADING),
    ("/trainer/exact/", "trainer/exact: draws, reduction, checks"),
    ("/trainer/core/", "trainer/core: forward's frame, meter, evaluation"),
    ("/trainer/components/", "trainer/components: loss, metrics, schedule"),
    ("/trainer/reporting/", "trainer/reporting: console, rows"),
    ("/trainer/process/", "trainer/process: ranks, signals"),
    ("/trainer/storage/", "trainer/storage: files"),
    ("/trainer/trainer.py", "trainer.py: the loop and the step"),
    ("/accelerate/", "Accelerate"),
)
ORDER = (LOADING, MODEL, BACKWARD, UPDATE, *(name for _, name in PARTS), REST)


class Samples:
    """While it takes samples, `counts` grows by `(loop, part)`."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Within it the timer runs."""
        before = signal.signal(signal.SIGPROF, self._take)
        signal.setitimer(signal.ITIMER_PROF, INTERVAL, INTERVAL)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)

    def _take(self, signal_number: int, frame: FrameType | None) -> None:
        part = loop = None
        steps = False
        while frame is not None:
            path, function = frame.f_code.co_filename, frame.f_code.co_name
            if path == loops.__file__:
                loop = RAW
                part = part or (LOADING if function == "fetch" else None)
            part = part or part_of(path)
            # Set-up, evaluation and the end of a run are no part of its steps.
            steps = steps or function == "_loop" or loop == RAW
            frame = frame.f_back
        if steps:
            self.counts[loop or LOCKSTEP, part or REST] += 1


@cache  # it is asked in the handler of a signal
def part_of(path: str) -> str | None:
    """The part that a source file belongs to; None of one that is in no part."""
    for beginning, part in PARTS:
        if beginning in path:
            return part
    return None


def table(workload: Workload, rounds: Rounds) -> str:
    """Markdown: µs of CPU time a step, by part, of the loop by hand and of Lockstep."""
    # The samples slow what they look at, so they give the shares alone.
    seconds = measure(workload, rounds, {RAW: loops.raw}, threads=1)
    samples = Samples()
    with samples.taken():
        measure(workload, rounds, {RAW: loops.raw}, threads=1)
    spent = {
        loop: 1e6 * float(np.median(seconds[loop], axis=0)[1])
        for loop in (RAW, LOCKSTEP)
    }
    totals = {
        loop: sum(count for (of, _), count in samples.counts.items() if of == loop)
        for loop in spent
    }
    lines = [
        f"| part | raw, µs | {LOCKSTEP}, µs | more, % of raw |",
        "|---|--:|--:|--:|",
    ]
    for part in dict.fromkeys(ORDER):
        raw, ours = (
            spent[loop] * samples.counts[loop, part] / max(1, totals[loop])
            for loop in (RAW, LOCKSTEP)
        )
        if raw or ours:
            lines.append(_row(part, raw, ours, spent[RAW]))
    lines.append(_row("all", spent[RAW], spent[LOCKSTEP], spent[RAW]))
    counted = f"{totals[RAW]:,} and {totals[LOCKSTEP]:,} samples"
    return "\n".join([f"## {workload.name}", "", counted, "", *lines])


def _row(part: str, raw: float, ours: float, whole: float) -> str:
    return f"| {part} | {raw:.0f} | {ours:.0f} | {100 * (ours - raw) / whole:+.1f} |"


def main(arguments: Sequence[str]) -> int:
    parser = page_parser("where", __doc__, rounds=100, quick="20 rounds")
    options = parser.parse_args(arguments)
    count = 20 if options.quick else options.rounds
    sections = (
        table(workload, Rounds(count, workload.steps)) for workload in workloads()
    )
    return write_page("Where the time of a step goes", sections, options.save)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
