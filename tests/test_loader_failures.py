"""Loader processes that are killed, or out of shared memory or file handles: one message, and what to set."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.programs import ROOT, Program
from trainer import ConfigError, LockstepError
from trainer.data import workers
from trainer.data.batches import MicroBatch, Request
from trainer.data.datasets import digits
from trainer.data.samples import KeyedDataset
from trainer.data.worker_failure import WorkerNotes
from trainer.data.workers import load_in_workers
from trainer.process.command import STOP_SIGNALS
from trainer.process.loader_start import TRAINS_AT_IMPORT

PROGRAM = """
import os, resource, signal, sys, torch
from torch.utils.data import get_worker_info
from trainer import Trainer, load
from trainer.process.exit import exit_process, report_error

class Images:
    classes = ["a", "b"]
    paths = [f"{i}.png" for i in range(400)]

    def __len__(self):
        return 400

    def __getitem__(self, index):
        if index == 17 and get_worker_info() is not None:
            HARM
        return torch.zeros(1, 8, 8, dtype=torch.uint8), index % 2

def main():
    settings = load("configs/digits.yaml", sys.argv[1:])
    Trainer(settings, train_data=Images(), val_data=Images()).fit()

try:
    main()
except BaseException as error:
    exit_process(report_error(error))
"""


OPTIONS = (
    "data.workers=2",
    "batch.size=8",
    "batch.micro_size=4",
    "train.epochs=2",
    "run.figures=false",
    "wandb.mode=disabled",
)
LOADING = "while it loaded train sample 17 (17.png)"
FEWER = "set data.workers, data.prefetch or batch.micro_size lower"
# What is done in the process that loads sample 17, and how the run's only message goes on and ends.
CASES = {
    "os.kill(os.getpid(), signal.SIGKILL)": (
        "loader process ",
        f"was killed by SIGKILL {LOADING}; if nobody did, the machine was out of memory: {FEWER}",
    ),
    "os.kill(os.getpid(), signal.SIGSEGV)": (
        "loader process ",
        f"was killed by SIGSEGV {LOADING}; data.workers=0 shows where, with a debugger or python -X faulthandler",
    ),
    "os._exit(3)": (
        "loader process ",
        f"ended with status 3 {LOADING}; data.workers=0 loads in the rank itself, which shows why",
    ),
    # What the kernel does where /dev/shm is full.
    "os.kill(os.getpid(), signal.SIGBUS)": (
        f"the loader processes ran out of shared memory (/dev/shm) {LOADING}; {FEWER}, or give it more",
        "(docker run --shm-size=8g)",
    ),
    # A file that may not grow is much like one on a full disk.
    "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))": (
        "the loader processes ran out of shared memory (/dev/shm)",
        "(docker run --shm-size=8g)",
    ),
    "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))": (
        "the loader processes ran out of file handles",
        f"raise their limit (ulimit -n), or {FEWER}",
    ),
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Program]]:
    """All at once: each waits for seconds, for PyTorch looks for its processes every 5 s."""
    root = tmp_path_factory.mktemp("runs")
    running = {}
    for number, harm in enumerate(CASES):
        arguments = [f"run.dir={root}", f"run.name=r{number}", *OPTIONS]
        running[harm] = Program(["-c", PROGRAM.replace("HARM", harm), *arguments])
    yield running
    for program in running.values():
        program.kill()


@pytest.mark.parametrize("harm", CASES)
def test_the_end_of_a_loader_process_is_one_message(
    programs: dict[str, Program], harm: str
) -> None:
    start, end = CASES[harm]
    done = programs[harm].wait(180)
    (message,) = (line for line in done.stderr.splitlines() if line)
    assert message.startswith(f"error: {start}") and message.endswith(end)
    assert done.returncode == 1


class Killed:
    """A process that ends before it has started."""

    def __init__(self, *_: object) -> None:
        raise EOFError("unexpected EOF")  # as multiprocessing.forkserver has it


def test_a_killed_server_of_loader_processes_is_one_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = KeyedDataset(digits().train, None, seed=0, purpose="train")
    monkeypatch.setattr("multiprocessing.context.Process._Popen", Killed)
    requests = [Request(0, 0, np.arange(4))]
    with pytest.raises(LockstepError, match=r"was killed while it started one; .*auto"):
        next(load_in_workers(data, requests, workers=1, prefetch=2, pin_memory=False))


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_signal_to_the_group_ends_no_process_that_is_being_started(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """torchrun sends its SIGTERM to the group of each rank. A loader process leaves it first thing."""
    begin = workers.begin_loader_process

    def begin_after_signal() -> None:
        os.kill(os.getpid(), number)
        begin()
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())

    monkeypatch.setattr(workers, "begin_loader_process", begin_after_signal)
    data = KeyedDataset(digits().train, None, seed=0, purpose="train")
    requests = [Request(0, 0, np.arange(4))]
    (batch,) = load_in_workers(data, requests, workers=1, prefetch=2, pin_memory=False)
    assert isinstance(batch, MicroBatch)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.fixture
def start_method(request: pytest.FixtureRequest) -> Iterator[str]:
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(before, force=True)


class Images:
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.zeros(1, 8, 8), index % 2


class WithLock(Images):
    def __init__(self) -> None:
        self.lock = threading.Lock()


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"], indirect=True)
def test_what_pickle_cannot_copy_to_loader_processes_is_named(
    start_method: str, recwarn: pytest.WarningsRecorder
) -> None:
    """As on macOS, and from Python 3.14 on: it was a traceback, and a warning of PyTorch's."""
    cases = (
        (WithLock(), None, "the train data set (WithLock)", "TypeError"),
        (Images(), lambda image: image, "data.train_transforms", ""),
    )
    requests = [Request(0, 0, np.arange(4))]
    for images, transform, part, kind in cases:
        data = KeyedDataset(images, transform, seed=0, purpose="train")
        loading = load_in_workers(
            data, requests, workers=1, prefetch=2, pin_memory=False
        )
        with pytest.raises(ConfigError) as caught:
            next(loading)
        text = str(caught.value)
        assert f"are started by {start_method} here" in text
        assert f"it cannot copy {part} ({kind}" in text and "data.workers=0" in text
    assert not [w for w in recwarn if "pickle" in str(w.message)]


class Ended:
    """A loader process that has ended, as multiprocessing has it."""

    pid = 12345

    def __init__(self, exitcode: int) -> None:
        self.exitcode = exitcode


@pytest.mark.parametrize("start_method", ["spawn"], indirect=True)
def test_a_loader_process_that_ends_before_it_begins_says_what_to_change(
    start_method: str,
) -> None:
    notes = WorkerNotes(1)
    error = RuntimeError("DataLoader worker exited unexpectedly")
    early = notes.failure(error, [Ended(1)], str)
    assert "while it imported what it needs" in str(early)
    imported = notes.failure(error, [Ended(TRAINS_AT_IMPORT)], str)
    assert isinstance(imported, ConfigError)
    assert 'under `if __name__ == "__main__":`' in str(imported)


UNGUARDED = """
import multiprocessing, sys, torch
from trainer import Trainer, load

if multiprocessing.current_process().name == "MainProcess":
    multiprocessing.set_start_method(sys.argv[1])
Trainer(load("configs/digits.yaml", sys.argv[2:])).fit()
"""


@pytest.mark.slow  # each loader process imports torch
@pytest.mark.fresh_process
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_program_that_trains_where_it_is_imported_is_one_message(
    tmp_path: Path, method: str
) -> None:
    """Each loader process trained, too, and was told to name another run."""
    program = tmp_path / "program.py"
    program.write_text(UNGUARDED)
    options = [f"run.dir={tmp_path}", "run.proof=off", *OPTIONS]
    done = subprocess.run(
        [sys.executable, str(program), method, *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    (message,) = (line for line in done.stderr.splitlines() if line)
    assert message.startswith("error: data.workers: loader processes are started by ")
    assert 'under `if __name__ == "__main__":`' in message
    assert done.returncode == 2
