"""What a run does as a trial of a sweep, or below a launcher: ends with its parent, has its own name, leaves a reason.

`wandb agent` hands each trial its values by argv, the same on every rank, and the ids of sweep and run by environment.
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

if TYPE_CHECKING:
    from trainer.config.schema import Config

SWEEP = "WANDB_SWEEP_ID"  # set by W&B's agent
LAUNCHED = (SWEEP, "LOCKSTEP_SWEEP", "TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")
SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>


def end_with_launcher() -> None:
    """Where a launcher or an agent started this process, have its end be a SIGTERM here: a stop at a step boundary.

    `accelerate launch` of one process dies of a SIGTERM without passing it on; the run would go on as an orphan and
    hold its GPU. And a W&B agent that is killed leaves the launchers below it running. A run that a shell started may
    outlive it, and is left alone.
    """
    if not any(name in os.environ for name in LAUNCHED):
        return
    end_with_parent()
    if SWEEP in os.environ:
        _end_with_agent()
    if os.getppid() == 1 and not _is_launcher(1):  # it had ended already (seen where orphans go to process 1)
        os.kill(os.getpid(), signal.SIGTERM)


def end_with_parent() -> None:
    """Ask the kernel for a SIGTERM when the parent ends. On Linux alone; elsewhere nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


def _end_with_agent() -> None:
    """Wait for the agent's end in a thread. Only what it started has the sweep's id in its environment from the start.

    On Linux alone; a process whose environment may not be read is of another user, and no launcher of this run.
    """
    if sys.platform != "linux":
        return
    with suppress(OSError, ValueError):  # an ancestor that ends meanwhile has had its children told
        process = os.getppid()
        while process > 1 and _began_with(process, SWEEP):
            process = process_status(process)[1]
        agent = os.pidfd_open(process)

        def watch() -> None:
            ended = select.poll()
            ended.register(agent, select.POLLIN)
            ended.poll()
            os.kill(os.getpid(), signal.SIGTERM)

        Thread(target=watch, daemon=True, name="agent").start()


def process_status(process: int) -> tuple[str, int, int]:
    """State, parent and group of a process. An `OSError` where it has ended; on Linux alone."""
    state, parent, group = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[:3]
    return state, int(parent), int(group)


def _began_with(process: int, variable: str) -> bool:
    try:
        return f"\0{variable}=".encode() in b"\0" + Path(f"/proc/{process}/environ").read_bytes()
    except PermissionError:
        return False


def _is_launcher(process: int) -> bool:
    """Whether a process (the first one of a container, say) may well be what starts trials."""
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return True
    return any(word in command for word in (Path(sys.argv[0]).name.encode(), b"wandb", b"trainer"))


def with_trial_name(config: Config) -> Config:
    """The config, in a W&B sweep with the run's id behind `run.name`: each trial needs a directory of its own."""
    if SWEEP not in os.environ or "WANDB_RUN_ID" not in os.environ:
        return config
    return replace(config, run=replace(config.run, name=f"{config.run.name}-{os.environ['WANDB_RUN_ID']}"))


def record_failure(error: BaseException) -> None:
    """In a W&B sweep, leave a failed run with its reason where the trial failed before its run began."""
    begun = "wandb" in sys.modules  # the client is imported to begin a run, never before
    if SWEEP not in os.environ or int(os.environ.get("RANK", "0")) or begun or isinstance(error, Stopped):
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher ends every process once another rank has failed
    with suppress(Exception):
        import wandb

        settings = wandb.Settings(silent=True, console="off", init_timeout=10, finish_timeout=10)
        run = wandb.init(settings=settings)
        run.summary["failure"] = failure_reason(error)
        run.finish(exit_code=1)


def failure_reason(error: BaseException) -> str:
    """One line on what went wrong, for the eyes of others."""
    first = (redacted_message(str(error)).strip() or type(error).__name__).splitlines()[0]
    return first if isinstance(error, LockstepError) else f"{type(error).__name__}: {first}"
