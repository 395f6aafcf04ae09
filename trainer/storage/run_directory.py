"""The run directory: made or resumed, locked while a run uses it, and never overwritten."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO
from uuid import uuid4

from trainer.config.fields import current_path
from trainer.config.load import load_resolved
from trainer.config.run_sections import RunConfig
from trainer.config.schema import Config
from trainer.config.secrets import holds_secret, redacted_value
from trainer.config.yaml_dump import to_yaml
from trainer.errors import ConfigError, LockstepError, config_error
from trainer.storage import checkpoint
from trainer.storage.files import (
    LOCK_ATTEMPTS,
    LOCK_FILE,
    is_at,
    lock_directory,
    write_text,
)
from trainer.storage.links import refuse_links_outside
from trainer.storage.trusted_runs import remember_made, remember_move

Change = tuple[Any, Any]  # a key's value before and now

# The keys, or whole sections, that a resumed run may change: where and how fast it runs, how far it goes, and what
# it logs. None of them changes what a step computes.
FREE_KEYS = (
    "run.name",
    "run.dir",
    "run.resume",
    "run.resume_changes",
    "run.proof",
    "run.figures",
    "run.timeout",
    "data.cache",
    "data.cache_dir",
    "data.max_pixels",
    "data.bad_samples",
    "data.max_bad",
    "data.workers",
    "data.prefetch",
    "data.on_device",
    "batch.fuse",
    "batch.eval_size",
    "train.cudnn_benchmark",
    "train.cuda_graphs",
    "train.epochs",
    "train.max_steps",
    "train.stop_after",
    "train.parallel",
    "train.log_every",
    "train.checkpoint_every",
    "train.checkpoint_every_epochs",
    "train.keep_checkpoints",
    "train.profile",
    "early_stop",
    "wandb",
    "observers",
    "trackers",
)


class RunDirectory:
    """`<run.dir>/<run.name>`, locked by this process until `close`.

    Attributes: `resume_from`, the checkpoints to resume from, in the order to try them; `moved_to`, where an earlier
    run of this name went; `token`, text in the lock file by which other machines can tell whether they see this very
    directory.
    """

    def __init__(self, section: RunConfig) -> None:
        self.path = run_path(section)
        self._lock_path = self.path / LOCK_FILE  # asked for before every row
        self.resume_from: list[Path] = []
        self.moved_to: Path | None = None
        resumes = section.resume != "never"
        if resumes:
            # Before the lock, so that nothing is locked where this raises.
            refuse_links_outside(self.path)
        self._lock: TextIO | None = self._make_and_lock()
        if resumes:
            self.resume_from = checkpoint.newest_first(self.path / "checkpoints")
        if not self.resume_from and self._holds_a_run():
            self._move_away()
        self.token = uuid4().hex
        self._lock.write(self.token)
        self._lock.flush()

    def _make_and_lock(self) -> TextIO:
        for _ in range(LOCK_ATTEMPTS):
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise config_error(
                    "run.dir",
                    f"{self.path} cannot be made ({error.strerror}); name another",
                    error,
                ) from None
            # The directory's owner may rename it in between.
            with suppress(FileNotFoundError):
                return lock(self.path)
        raise ConfigError("run.name", f"{self.path} is renamed while it is opened")

    def _move_away(self) -> None:
        """Rename the directory, with the earlier run in it, and lock a new one at its path."""
        before = self.path.resolve()
        moved_to = _free_path(self.path)
        # Locked until it has another name: nobody else may begin to train in what is about to move.
        self.path.rename(moved_to)
        remember_move(before, moved_to)
        self.close()
        self.moved_to = moved_to
        self._lock = self._make_and_lock()

    def check(self) -> None:
        """Raise `LockstepError` if the directory at `path` is no longer this one: it was deleted, moved or replaced.

        The rows would go on to nowhere, and a checkpoint would make a new directory that holds nothing else.
        """
        assert self._lock is not None
        # Not the directory's number, which a file system may give to the next one.
        if is_at(self._lock, self._lock_path):
            return
        raise LockstepError(
            f"{self.path}, the directory of this run, was {self._whereabouts()}; what the run would write from now on "
            f"would be lost, so it ends here"
        )

    def _whereabouts(self) -> str:
        """What became of the directory, as far as the system says it."""
        assert self._lock is not None
        link = Path(f"/proc/self/fd/{self._lock.fileno()}")
        with suppress(OSError):  # it is deleted, or this system does not say
            now = link.readlink().parent
            if is_at(self._lock, now / LOCK_FILE):
                return (
                    f"moved to {now} (run.dir={now.parent} run.name={now.name} "
                    f"run.resume=auto goes on from its newest checkpoint)"
                )
        return "deleted or moved"

    def close(self) -> None:
        """Release the lock, and take back the token: who still finds it knows that its owner was killed."""
        if self._lock is not None:
            with suppress(OSError):  # the error that ends the run is another
                self._lock.truncate(0)
            self._lock.close()
            self._lock = None

    def _holds_a_run(self) -> bool:
        return any(entry.name != LOCK_FILE for entry in self.path.iterdir())


def sees_token(path: Path, token: str) -> bool:
    """True if the directory at `path` is the one with this token, on this machine or on a shared disk."""
    try:
        return (path / LOCK_FILE).read_text() == token
    except OSError:
        return False


def lock(path: Path) -> TextIO:
    """Lock a run directory until the returned file is closed. Raises `ConfigError` if another process has the lock."""
    if (path / LOCK_FILE).is_symlink():
        # To lock a file is to empty it.
        raise ConfigError(
            str(path / LOCK_FILE), "is a link, and is not followed; remove it"
        )
    file = lock_directory(path)
    if file is None:
        raise ConfigError(
            "run.name",
            f"another process is training in {path}; give this run another name",
        )
    return file


def run_path(section: RunConfig) -> Path:
    """`<run.dir>/<run.name>`."""
    if section.name in ("", ".", "..") or "/" in section.name:
        raise ConfigError(
            "run.name",
            f'"{section.name}" is not a directory\'s name; set run.dir for where runs are kept',
        )
    return Path(section.dir) / section.name


def write_config(path: Path, config: Config) -> None:
    """Write `config.yaml` into the run directory at `path`, and note that it was written here."""
    text = config_yaml(config)
    write_text(path / "config.yaml", text, private=holds_secret(config.to_dict()))
    remember_made(path, (path / "config.yaml").read_bytes())


def config_yaml(config: Config) -> str:
    """The resolved config as YAML, with references to the environment instead of their values; it reads back alike."""
    return to_yaml(config.to_dict(), sort_keys=False, allow_unicode=True)


def read_config(run: Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a finished or unfinished run, with `key=value` overrides applied.

    It may be from elsewhere, so nothing is built of it: `core.trust` reads what may be. Raises `ConfigError` as
    `config_file` does.
    """
    return load_resolved(config_file(run), overrides)


def config_file(run: Path, directory: Path | None = None) -> Path:
    """The config of the run at `run`, or of a part of it, `directory`.

    Raises `ConfigError` if `run` is not a run directory, or has a link that leads out of it.
    """
    directory = directory or run
    for folder in (run, directory):
        if not (folder / "config.yaml").is_file():
            raise ConfigError(
                str(folder), "is not a run directory: it has no config.yaml"
            )
    refuse_links_outside(run)
    return directory / "config.yaml"


def changed_keys(
    before: Mapping[str, Any], now: Mapping[str, Any]
) -> dict[str, Change]:
    """The dotted keys of nested mappings whose values differ, each with both values; "not set" where one lacks it."""
    old = _flatten(before)
    # Tuples become lists, as in what was read from a file.
    new = _flatten(json.loads(json.dumps(now)))
    changes = {}
    for name in sorted({*old, *new}):
        change = (old.get(name, "not set"), new.get(name, "not set"))
        if change[0] != change[1]:
            changes[name] = change
    return changes


def check_same_run(before: Mapping[str, Any], now: Config, section: RunConfig) -> None:
    """Raise `ConfigError` if the config `now` describes another run than the one to resume, naming every such key.

    `before` is a checkpoint's config. `run.resume_changes=allow` accepts every change but another optimizer.
    """
    changes = {}
    for name, change in changed_keys(
        _with_defaults(before), now.to_dict(digests=True)
    ).items():
        if not is_free(name):
            changes[name] = change
    if changes and section.resume_changes == "refuse":
        listing = "; ".join(
            f"{name} was {redacted_value(name, was)} and is {redacted_value(name, now_is)}"
            for name, (was, now_is) in changes.items()
        )
        raise ConfigError(
            next(iter(changes)),
            f"the run to resume was made with another config: {listing}. Set the old values, start a new run with "
            f"run.resume=never, or accept the change with run.resume_changes=allow",
        )
    if "optimizer.name" in changes:
        was, now_is = changes["optimizer.name"]
        raise ConfigError(
            "optimizer.name",
            f"{now_is} cannot go on from the state of {was}; start a new run, with the old one's "
            "best/model.safetensors as model.weights",
        )


def is_free(name: str) -> bool:
    """True if a key may change when a run is resumed, because it does not change the run's mathematics."""
    section = name.partition(".")[0]
    # Training never sees the test set.
    is_of_test = name == "data.test" or name.startswith("data.test.")
    return name in FREE_KEYS or section in FREE_KEYS or is_of_test


def _with_defaults(before: Mapping[str, Any]) -> dict[str, Any]:
    """A config's mappings with a default for each key that they lack: one that an earlier version did not know."""
    tree = dict(before)
    for section, defaults in Config().to_dict().items():
        if isinstance(defaults, Mapping):
            values = {**defaults, **before.get(section, {})}
            if isinstance(values.get("name"), str):
                values["name"] = current_path(values["name"])
            tree[section] = values
        else:
            tree.setdefault(section, defaults)
    return tree


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _free_path(path: Path) -> Path:
    """`path` with the first number behind it that no file has yet."""
    number = 1
    while (candidate := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return candidate
