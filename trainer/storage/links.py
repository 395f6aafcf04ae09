"""Nothing in a run directory is followed outside it: links that lead out are refused before anything is opened.

A directory from elsewhere may hold `replay -> /home/you`, or `best/model.safetensors -> ~/.ssh/id_rsa`, which a command
would write to, or send to W&B.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from trainer.errors import ConfigError

# W&B links its sessions' logs to its cache in the user's home. Nothing here opens them.
LOGS_OF_WANDB = "logs"


def refuse_links_outside(run: Path) -> None:
    """Raise `ConfigError`, naming it, for a symbolic link below `run` that leads out of `run`, or nowhere in it.

    `run` itself may be a link, and so may anything above it.
    """
    root = run.resolve()
    for link in _links(root):
        target = link.resolve()
        if not target.is_relative_to(root):
            name = link.relative_to(root)
            raise ConfigError(
                str(run / name),
                f"is a link to {target}, outside the run directory, and is not followed; put what it leads to in its "
                f"place, or make {run} itself, or run.dir, the link",
            )


def _links(root: Path) -> Iterator[Path]:
    for directory, directories, files in os.walk(root):
        folder = Path(directory)
        if folder.parent.parent == root / "wandb" and folder.name == LOGS_OF_WANDB:
            directories.clear()
            continue
        for name in sorted([*directories, *files]):
            path = folder / name
            if path.is_symlink():
                yield path
