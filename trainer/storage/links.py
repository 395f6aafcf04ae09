"""Nothing in a run directory is followed outside it: links that lead out are refused before anything is opened.

A directory from elsewhere may hold `replay -> /home/you`, or `best/model.safetensors -> ~/.ssh/id_rsa`, which a command
would write to, or send to W&B.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from trainer.errors import ConfigError

# W&B links its sessions' logs to its cache in the user's home, and links to these. Nothing here opens them.
LOGS_OF_WANDB = ("wandb/debug*.log", "wandb/*/logs/*")


def refuse_links_outside(run: Path) -> None:
    """Raise `ConfigError`, naming it, for a symbolic link below `run` that leads out of `run`.

    `run` itself may be a link, and so may anything above it.
    """
    root = run.resolve()
    for link in _links(root):
        name, target = link.relative_to(root), _target(link)
        if not _is_log(name) and not target.is_relative_to(root):
            raise ConfigError(
                str(run / name),
                f"is a link to {target}, outside the run directory, and is not followed; put what it leads to in its "
                f"place, or make {run} itself, or run.dir, the link",
            )


def _links(root: Path) -> Iterator[Path]:
    for directory, directories, files in os.walk(root):
        for name in sorted([*directories, *files]):
            path = Path(directory, name)
            if path.is_symlink():
                yield path


def _target(link: Path) -> Path:
    """What a link leads to in the end; what it says itself where that is nothing, as in a circle of links."""
    try:
        return link.resolve()
    except (OSError, RuntimeError):
        return Path(os.path.normpath(link.parent / link.readlink()))


def _is_log(name: Path) -> bool:
    is_of_wandb = name.parts[0] == "wandb"
    return is_of_wandb and any(name.match(pattern) for pattern in LOGS_OF_WANDB)
