"""The run directory: found or made, locked while a run uses it, and never overwritten."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import yaml

from trainer.config.load import load
from trainer.config.schema import Config, RunConfig
from trainer.errors import ConfigError
from trainer.storage import checkpoint
from trainer.storage.files import write_text

# What a resumed run may change freely: where it runs and how it is watched, how far it goes. A whole section
# or a key.
FREE_KEYS = (
    "run.name",
    "run.dir",
    "run.resume",
    "run.resume_changes",
    "run.figures",
    "data.cache",
    "data.workers",
    "data.prefetch",
    "batch.fuse",
    "batch.eval_size",
    "train.epochs",
    "train.max_steps",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "wandb",
    "observers",
)


class RunDirectory:
    """`<run.dir>/<run.name>`, held by this process until `close`. `resume_from` is the checkpoint to go on from."""

    def __init__(self, section: RunConfig) -> None:
        self.path = run_path(section)
        self.moved_to: Path | None = None
        self._lock: TextIO | None = None
        if self.path.is_dir():
            self._lock = lock(self.path)
        self.resume_from = checkpoint.latest(self.path / "checkpoints") if section.resume == "auto" else None
        if self.resume_from is None and self._holds_a_run():
            self.close()
            self.moved_to = _free_name(self.path)
            self.path.rename(self.moved_to)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError("run.dir", f"{self.path} cannot be made ({error.strerror}); name another") from None
        if self._lock is None:
            self._lock = lock(self.path)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _holds_a_run(self) -> bool:
        return self.path.is_dir() and any(entry.name != ".lock" for entry in self.path.iterdir())


def lock(path: Path) -> TextIO:
    """Hold a run directory until the returned file is closed."""
    file = (path / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError("run.name", f"another process is training in {path}; give this run another name") from None
    return file


def run_path(section: RunConfig) -> Path:
    """`<run.dir>/<run.name>`."""
    if not section.name or section.name in (".", "..") or "/" in section.name:
        raise ConfigError(
            "run.name", f'"{section.name}" is not a directory\'s name; set run.dir for where runs are kept'
        )
    return Path(section.dir) / section.name


def write_config(path: Path, config: Config) -> None:
    write_text(path / "config.yaml", config_yaml(config))


def config_yaml(config: Config) -> str:
    """The resolved config as YAML, text from the environment as the reference to it; it reads back to the same."""
    return yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)


def read_config(run: Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a finished or unfinished run, `key=value` overrides laid over it."""
    if not (run / "config.yaml").is_file():
        raise ConfigError(str(run), "is not a run directory: it has no config.yaml")
    return load(run / "config.yaml", overrides)


def changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys, in nested mappings, whose values differ, with both; "not set" where one lacks it."""
    old, new = dict(_flat(before, "")), dict(_flat(json.loads(json.dumps(now)), ""))
    pairs = {name: (old.get(name, "not set"), new.get(name, "not set")) for name in sorted({*old, *new})}
    return {name: (was, now) for name, (was, now) in pairs.items() if was != now}


def check_same_run(before: Mapping[str, Any], now: Config, section: RunConfig) -> None:
    """Refuse to resume under a config that would make another run of it, naming every key that differs."""
    now_plain = now.to_dict(digests=True)
    changed = {name: pair for name, pair in changed_keys(before, now_plain).items() if not is_free(name)}
    if changed and section.resume_changes == "refuse":
        listed = "; ".join(f"{name} was {was} and is {now_is}" for name, (was, now_is) in changed.items())
        raise ConfigError(
            next(iter(changed)),
            f"the run to resume was made with another config: {listed}. Set the old values, start a new run with "
            f"run.resume=never, or accept the change with run.resume_changes=allow",
        )
    if "optimizer.name" in changed:
        was, now_is = changed["optimizer.name"]
        raise ConfigError(
            "optimizer.name",
            f"{now_is} cannot go on from the state of {was}; start a new run, with the old one's "
            "best/model.safetensors as model.weights",
        )


def is_free(name: str) -> bool:
    """Whether a key may change without making another run of it."""
    return name in FREE_KEYS or name.partition(".")[0] in FREE_KEYS


def _flat(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _free_name(path: Path) -> Path:
    number = 1
    while (candidate := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return candidate
