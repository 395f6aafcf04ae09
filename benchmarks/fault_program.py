"""`train.py` with a fault at one of its file operations: python -m benchmarks.fault_program KIND NUMBER [key=value …]

KIND is `kill`, which ends the process by SIGKILL before its NUMBER-th operation, or `full`, from which on every write
fails as on a full disk.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Fault:
    """Counts the operations that change files, and strikes at one of them."""

    def __init__(self, kind: str, number: int) -> None:
        self.kind = kind
        self.left = number

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


def main() -> None:
    kind, number, *arguments = sys.argv[1:]
    fault = Fault(kind, int(number))
    for name in ("rename", "replace", "write_text", "mkdir"):
        fault.wrap(Path, name)
    fault.wrap(os, "fsync")
    fault.wrap(shutil, "rmtree")

    from trainer.storage import stateful

    fault.wrap(stateful, "save_file")
    from trainer.commands.train import main as train
    from trainer.process.exit import exit_process

    exit_process(train(arguments))


if __name__ == "__main__":
    main()
