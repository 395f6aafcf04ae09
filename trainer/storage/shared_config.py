"""A run's config where machines share no disk: rank 0 reads the file, and every rank gets its text."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from trainer.config.schema import Config
from trainer.process import launcher
from trainer.process.ranks import Ranks
from trainer.storage.run_directory import read_config

CONFIG_FILE = "config.yaml"

T = TypeVar("T")


def read_config_on_all(
    run: Path, overrides: Sequence[str], read: Callable[[], Config]
) -> Config:
    """The config of a run, with overrides applied, on every rank: on several machines, as rank 0 reads it.

    `read` reads it here. On several machines rank 0 alone calls it, in a collective. Raises what `read` raises.
    """
    if not _is_on_several_machines():
        return read()
    configs: list[Config] = []  # of rank 0

    def read_text() -> str:
        configs.append(read())
        return (run / CONFIG_FILE).read_text()

    text = read_on_main(read_text)
    if configs:
        return configs[0]
    with TemporaryDirectory() as directory:
        copy = Path(directory)
        (copy / CONFIG_FILE).write_text(text)
        return read_config(copy, overrides)


def read_on_main(read: Callable[[], T]) -> T:
    """What `read` returns, on every rank: on several machines rank 0 alone calls it.

    A collective on several machines. Raises what `read` raises.
    """
    if not _is_on_several_machines():
        return read()
    # The config's own precision is not known yet, so whatever the launcher says is right for now.
    ranks = Ranks(os.environ.get("ACCELERATE_MIXED_PRECISION", "fp32"))
    result: T = ranks.on_main(read)
    return result


def _is_on_several_machines() -> bool:
    return launcher.world_size() > launcher.local_world_size()
