"""What a run owes the process that started it: to end with its launcher, and to be one trial of a W&B sweep.

`wandb agent` gives each trial its values as arguments, the same on every rank, and the ids of sweep and run as
environment variables.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from trainer.config.secrets import redacted_message
from trainer.errors import LockstepError, Stopped
from trainer.process import launcher

if TYPE_CHECKING:
    from trainer.config.schema import Config

SWEEP_ID, RUN_ID = "WANDB_SWEEP_ID", "WANDB_RUN_ID"  # variables that W&B's agent sets
# Variables of which at least one is set in a process that a launcher, an agent or a local sweep started.
LAUNCHER_VARIABLES = (
    SWEEP_ID,
    "LOCKSTEP_SWEEP",
    "TORCHELASTIC_RUN_ID",
    "ACCELERATE_MIXED_PRECISION",
)
SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
STATUS_FIELD = 52  # of /proc/PID/stat, counted from 1
# Seconds to connect, and again to send, when a failure is recorded.
WANDB_TIMEOUT = 10.0


def end_with_launcher() -> None:
    """Send this process a SIGTERM, and so stop it at a step boundary, when its launcher or agent ends.

    `accelerate launch` of one process does not pass a SIGTERM on, and a W&B agent that is killed leaves the launchers
    below it running. In both cases the run would go on as an orphan and hold its GPU. A run started from a shell may
    outlive the shell, so nothing is done there.
    """
    if not any(name in os.environ for name in LAUNCHER_VARIABLES):
        return
    end_with_parent()
    if SWEEP_ID in os.environ:
        _end_with_agent()
    # The launcher may have ended before the calls above. Its orphans then belong to process 1.
    if os.getppid() == 1 and not _is_launcher(1):
        _stop_this_process()


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """Ask the kernel to send this process a signal when its parent ends. Does nothing except on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(SET_PARENT_DEATH_SIGNAL, number)


def _end_with_agent() -> None:
    """Send this process a SIGTERM when the W&B agent above it ends. Does nothing except on Linux."""
    if sys.platform != "linux":
        return
    # An ancestor may end while it is looked at. Its children then get the signal that end_with_parent() asked for.
    with suppress(OSError, ValueError):
        agent = os.pidfd_open(_find_agent())

        def wait_for_end() -> None:
            poll = select.poll()
            poll.register(agent, select.POLLIN)
            poll.poll()
            _stop_this_process()

        Thread(target=wait_for_end, daemon=True, name="agent").start()


def _find_agent() -> int:
    """The nearest ancestor that did not get the sweep's id when it was started: the agent sets it for its children."""
    process = os.getppid()
    while process > 1 and _was_started_with(process, SWEEP_ID):
        _, process, _ = process_status(process)
    return process


def _stop_this_process() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def process_status(process: int) -> tuple[str, int, int]:
    """State, parent and group of a process. Raises `OSError` if it has ended. For Linux only."""
    state, parent, group, *_ = _status_fields(process)
    return state, int(parent), int(group)


def _status_fields(process: int) -> list[str]:
    """What the kernel says of a process, from the third field of its status on, the state. Raises `OSError`."""
    # The second field, the program's name in parentheses, may itself hold spaces and parentheses.
    text = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2]
    return text.split()


def has_ended(process: int) -> bool:
    """True if a process of this machine has ended, whether or not its parent knows. False where it cannot be told."""
    if not process or sys.platform != "linux":
        return False
    try:
        state, _, _ = process_status(process)
    except OSError:
        return True
    return state == "Z"


def fatal_signal(process: int) -> int | None:
    """The signal that ended a process whose parent has not yet asked for its status; else None. For Linux only."""
    try:
        fields = _status_fields(process)
    except OSError:
        return None
    if fields[0] != "Z":
        return None
    # The status that the parent will get.
    return int(fields[STATUS_FIELD - 3]) & 0x7F or None


def signal_name(number: int) -> str:
    """The name of a signal, as SIGKILL; a real-time one has none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _was_started_with(process: int, variable: str) -> bool:
    """True if an environment variable was set when a process of this user was started."""
    try:
        environment = Path(f"/proc/{process}/environ").read_bytes()
    except PermissionError:
        return False  # another user's process is not a launcher of this run
    return f"\0{variable}=".encode() in b"\0" + environment


def _is_launcher(process: int) -> bool:
    """True if a process may be what starts trials, as the first process of a container can be."""
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return True
    script = Path(sys.argv[0]).name.encode()
    return any(word in command for word in (script, b"wandb", b"trainer"))


def with_trial_name(config: Config) -> Config:
    """In a W&B sweep, the config with the run's id added to `run.name`: each trial needs a directory of its own."""
    if SWEEP_ID not in os.environ or RUN_ID not in os.environ:
        return config
    name = f"{config.run.name}-{os.environ[RUN_ID]}"
    return replace(config, run=replace(config.run, name=name))


def record_failure(error: BaseException) -> None:
    """In a W&B sweep, record a trial that failed before its W&B run began, with the reason, as a failed run."""
    if SWEEP_ID not in os.environ or launcher.rank() != 0 or isinstance(error, Stopped):
        return
    if "wandb" in sys.modules:
        # The client is imported only to begin a run, which then records its own failure.
        return
    # A launcher ends every process once another rank has failed.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with suppress(Exception):
        import wandb

        settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=WANDB_TIMEOUT,
            finish_timeout=WANDB_TIMEOUT,
            stop_fn=lambda: None,  # it has ended already
        )
        run = wandb.init(settings=settings)
        run.summary["failure"] = failure_reason(error)
        run.finish(exit_code=1)


def failure_reason(error: BaseException) -> str:
    """The first line of an error's message, with secrets removed: it is sent to others."""
    name = type(error).__name__
    message = redacted_message(str(error)).strip() or name
    line = message.splitlines()[0]
    return line if isinstance(error, LockstepError) else f"{name}: {line}"
