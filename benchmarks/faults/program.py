"""`lockstep COMMAND …` in a process of its own, with a fault of its own.

A `Fault` of kind `kill` ends the process by SIGKILL before its `number`-th operation on a file; after `full`, from that
operation on, every write fails as on a full disk; `nan` makes the loss of step `number` NaN on rank 0.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Fault:
    kind: Literal["kill", "full", "nan"]
    number: int


def become_command(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    output: Path,
    fault: Fault | None,
) -> None:
    """In a forked process: run a command, and end as it does. `output` gets what it prints, `output.err` its errors."""
    os.environ.clear()
    os.environ.update(environment)
    _redirect(output, 1)
    _redirect(output.with_suffix(".err"), 2)
    sys.argv = ["lockstep", *arguments]
    if fault is not None:
        inject(fault)
    from trainer.__main__ import main
    from trainer.process.exit import exit_process

    try:
        exit_process(main(list(arguments)))
    except SystemExit as leaving:
        threading._shutdown()  # type: ignore[attr-defined]
        sys.stdout.flush()
        os._exit(leaving.code if isinstance(leaving.code, int) else 1)


def _redirect(path: Path, descriptor: int) -> None:
    # Ranks share the files, so each appends.
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(file, descriptor)
    os.close(file)


def inject(fault: Fault) -> None:
    if fault.kind == "nan":
        _break_loss(fault.number)
        return
    strikes = _Strikes(fault)
    for name in ("rename", "replace", "write_text", "mkdir"):
        strikes.wrap(Path, name)
    strikes.wrap(os, "fsync")
    strikes.wrap(shutil, "rmtree")

    from trainer.storage import stateful

    strikes.wrap(stateful, "save_file")


class _Strikes:
    """Counts the operations that change files, and strikes at one of them."""

    def __init__(self, fault: Fault) -> None:
        self.kind = fault.kind
        self.left = fault.number

    def strike_at(self, path: object) -> None:
        """Count an operation on `path`, and strike if its turn has come."""
        self.left -= 1
        if self.left > 0:
            return
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def wrap(self, owner: Any, name: str) -> None:
        """Let `owner.name` strike; its first argument says what it works on."""
        original: Callable[..., Any] = getattr(owner, name)

        def strike(*args: Any, **more: Any) -> Any:
            # Deleting works on a full disk.
            if self.kind == "kill" or name != "rmtree":
                self.strike_at(args[0])
            return original(*args, **more)

        setattr(owner, name, strike)


def _break_loss(number: int) -> None:
    """Make the first loss of a step NaN, and with it the gradient."""
    from trainer.trainer import Trainer

    original = Trainer.train_step

    def train_step(trainer: Trainer, step: Any) -> None:
        if step.number != number or trainer.run.ranks.rank != 0:
            original(trainer, step)
            return
        precision = trainer.run.precision
        backward = precision.backward

        def backward_of_nan(total: Any, scale: Any) -> None:
            precision.backward = backward  # type: ignore[method-assign]
            backward(total * float("nan"), scale)

        precision.backward = backward_of_nan  # type: ignore[method-assign]
        original(trainer, step)

    Trainer.train_step = train_step  # type: ignore[method-assign]
