"""Before a run with loader processes: is there shared memory, and are there file handles, for what they keep ready?

Both would otherwise run out in the midst of the run, in a process that has no more to say than a bus error.
"""

from __future__ import annotations

import math
import mmap
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from trainer.config.schema import Config
from trainer.core.run import Run
from trainer.data.loading import Loader
from trainer.data.on_device import CHUNK
from trainer.errors import ConfigError
from trainer.exact.structures import tensors_in
from trainer.process import launcher
from trainer.process.machine import usable_processors

SHARED_MEMORY = Path("/dev/shm")  # where PyTorch's loaders put micro-batches, on Linux
OPEN_FILES = Path("/proc/self/fd")
# Pipes, queues and locks between a rank and one loader process, and what else a run opens: both rounded up.
FILES_OF_A_WORKER = 8
FILES_BESIDES = 64
# The first step waits until all of these are asked for.
MOST_PREFETCHED = 1000


@dataclass(frozen=True)
class InFlight:
    """What the loader processes of one rank keep ready: micro-batches, bytes and tensors of each."""

    batches: int = 0
    bytes: int = 0
    tensors: int = 0

    @property
    def total_bytes(self) -> int:
        return self.batches * self.bytes

    @property
    def total_tensors(self) -> int:
        return self.batches * self.tensors


def check_loader_limits(run: Run) -> None:
    """Raise `ConfigError` where loader processes could not keep ready what the config asks for. A collective."""
    section = run.config.data
    if section.workers and section.prefetch > MOST_PREFETCHED:
        raise ConfigError(
            "data.prefetch",
            f"{section.prefetch:,} micro-batches would be asked of each loader process before the first step begins; "
            f"set at most {MOST_PREFETCHED:,}, of which a few are as fast",
        )
    if section.workers and sys.platform == "linux":
        run.ranks.on_each(lambda: _check(run))


def loader_note(config: Config) -> str:
    """What a run's header says of more loader processes than processors; "" otherwise."""
    workers, processors = config.data.workers, usable_processors()
    if workers <= processors:
        return ""
    noun = "processor" if processors == 1 else "processors"
    return f"data.workers={workers} are more than the {processors} {noun} here, which is seldom faster and takes memory"


def _check(run: Run) -> None:
    if run.train_loader.dataset.collation is not None:
        return  # what it makes of the samples is not known from one of them
    if run.config.data.on_device:
        in_flight = [_of_device_sets(run)]
    else:
        # The training loader keeps its micro-batches while one of the others runs.
        in_flight = [_of_training(run)]
        evaluated = [_of_evaluation(run, item.loader) for item in run.evaluation_sets]
        if evaluated:
            in_flight.append(max(evaluated, key=lambda item: item.total_bytes))
    _check_shared_memory(run, sum(item.total_bytes for item in in_flight))
    _check_open_files(run, sum(item.total_tensors for item in in_flight))


def _of_device_sets(run: Run) -> InFlight:
    """Sets that are to lie on the device are read in parts, one set after the other: what is in memory already, not."""
    largest = InFlight()
    for loader in (run.train_loader, *(item.loader for item in run.evaluation_sets)):
        if loader.dataset.arrays is None:
            samples = len(loader.dataset.dataset)
            parts = math.ceil(samples / CHUNK)
            one = _in_flight(run, loader, min(CHUNK, samples), parts)
            largest = max(largest, one, key=lambda item: item.total_bytes)
    return largest


def _of_training(run: Run) -> InFlight:
    step = run.plan.step(0)
    start, end = step.micro_batches[0]
    fuse = run.config.batch.fuse
    first, last = step.ranks[run.ranks.rank]
    of_rank = last - first
    count = 1 if fuse == "auto" else min(fuse, of_rank)
    samples = (end - start) * count
    batches = of_rank * run.plan.total_steps
    return _in_flight(run, run.train_loader, samples, batches)


def _of_evaluation(run: Run, loader: Loader) -> InFlight:
    samples = len(loader.dataset.dataset)
    size = min(run.config.batch.eval_size, samples)
    return _in_flight(
        run, loader, size, math.ceil(samples / max(1, size) / run.ranks.count)
    )


def _in_flight(run: Run, loader: Loader, samples: int, batches: int) -> InFlight:
    """That of micro-batches of so many samples, of which there are `batches` at most."""
    section = run.config.data
    one = loader.fetch([loader.first_id])
    tensors = list(tensors_in((one.inputs, one.targets)))
    size = sum(_in_pages(tensor.nbytes * samples) for tensor in tensors)
    return InFlight(
        min(batches, section.workers * section.prefetch), size, len(tensors)
    )


def _in_pages(size: int) -> int:
    return math.ceil(size / mmap.PAGESIZE) * mmap.PAGESIZE


def _check_shared_memory(run: Run, needed: int) -> None:
    if not SHARED_MEMORY.is_dir():
        return
    ranks = launcher.local_world_size()
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed * ranks <= free:
        return
    section = run.config.data
    each = f"the {section.workers} loader processes of each of {ranks} ranks"
    who = each if ranks > 1 else f"{section.workers} loader processes"
    gib = math.ceil(needed * ranks / 2**30)
    parts = "micro-batches"
    smaller = "data.workers, data.prefetch, batch.micro_size or batch.eval_size lower"
    if section.on_device:
        parts = f"times {CHUNK} samples (data.on_device)"
        smaller = "data.workers or data.prefetch lower"
    raise ConfigError(
        "data.workers",
        f"{who} that keep {section.prefetch} {parts} ready (data.prefetch) need {needed * ranks / 1e6:,.1f} MB of "
        f"shared memory, and {SHARED_MEMORY} has {free / 1e6:,.1f} MB free; set {smaller}, or give it more (docker run "
        f"--shm-size={gib}g)",
    )


def _check_open_files(run: Run, tensors: int) -> None:
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY or not OPEN_FILES.is_dir():
        return
    section = run.config.data
    is_open = sum(1 for _ in OPEN_FILES.iterdir())
    # Those of training and those of one evaluation.
    of_workers = 2 * section.workers * FILES_OF_A_WORKER
    needed = is_open + tensors + of_workers + FILES_BESIDES
    if needed > limit:
        raise ConfigError(
            "data.workers",
            f"{section.workers} loader processes that keep {section.prefetch} micro-batches ready (data.prefetch) need "
            f"about {needed:,} open files, and a process may have {limit:,}; raise the limit (ulimit -n {needed}), or "
            f"set data.workers or data.prefetch lower",
        )
