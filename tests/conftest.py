"""One thread a process: the parent must hold no thread pool when it forks, and cores are few and shared."""

import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Where a user's programs keep what they remember: no test may write to, or depend on, the real one.
STATE = tempfile.TemporaryDirectory(prefix="lockstep-state-")
os.environ["XDG_STATE_HOME"] = STATE.name
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["WANDB_ERROR_REPORTING"] = "false"
# As `train.py` does before it imports torch, which the programs forked from here have imported.
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
for launcher in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "WANDB_API_KEY", "WANDB_MODE"):
    os.environ.pop(launcher, None)

# A run waits for the disk over forty times, however short it is. No test needs its files to outlive the machine.
MEMORY = Path("/dev/shm")
if (
    MEMORY.is_dir()
    and shutil.disk_usage(MEMORY).free > 4 * 2**30  # all tests write less than 1 GB
    and not os.statvfs(MEMORY).f_flag & os.ST_NOEXEC  # some run what they write
):
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# A busy machine is no failure, and half of the usual examples find the same.
settings.register_profile("untimed", deadline=None, max_examples=50)
settings.load_profile("untimed")

# The files that take longest, in seconds of an idle machine with two cores, roughly.
LONGEST = {
    "test_wandb_agent.py": 70,
    "test_wandb_online.py": 65,
    "test_launchers.py": 55,
    "test_configs.py": 50,
    "test_hangs.py": 50,
    "test_bitwise.py": 40,
    "test_hosts.py": 40,
    "test_benchmarks.py": 35,
    "test_sweep.py": 35,
    "test_examples.py": 25,
    "test_restart.py": 20,
    "test_lessons.py": 20,
    "test_notebook.py": 20,
    "test_background_saving.py": 20,
    "test_proof.py": 20,
    "test_faults.py": 15,
    "test_fuzz.py": 15,
    "test_cuda_graphs.py": 15,
    "test_answers.py": 15,
    "test_norm_modes.py": 15,
    "test_sharded.py": 15,
    "test_collate.py": 15,
    "test_observers.py": 15,
    "test_not_finite.py": 15,
    "test_resume.py": 15,
    "test_unshared_disks.py": 15,
    "test_commands.py": 10,
    "test_two_machines.py": 10,
    "test_slurm.py": 10,
}


def pytest_configure(config: pytest.Config) -> None:
    """One thread of torch's, wherever tests run. A process that deals them out to others imports no torch."""
    if not config.getoption("numprocesses", None):
        import torch  # reads the environment

        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; the others stay in their order."""
    items.sort(key=lambda item: -LONGEST.get(item.path.name, 0))


def pytest_collection_finish() -> None:
    """Take all that is imported by now out of the garbage collector's sight.

    Every run that a test makes collects garbage when it begins, which took two thirds of a small run's time: there are
    a million objects of torch's, pytest's and others', none of them garbage.
    """
    from trainer.process.machine import package_versions

    package_versions()  # what it has read once, the ranks forked from here need not read again
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_death_by_closed_pipe() -> Iterator[None]:
    """A command run within the tests lets SIGPIPE end its process, as a command's own process should.

    The tests' process, and the ranks forked from it later, would then end without a word when W&B's process does.
    """
    yield
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
