"""Checkpoints: complete or absent, verified when read, and independent of the number of ranks.

    checkpoints/step_00000023/   model.safetensors  optimizer.safetensors  state.json  manifest.json
                                 and, for each stateful object, <name>.safetensors  <name>.json
                                 and, if a loss or the like has a state, further.safetensors  further.json
    checkpoints/last             a text file: the name of the newest complete checkpoint

No random state is saved. A run's position is its step number, and every random draw is keyed by its place in the run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.config.secrets import holds_secret
from trainer.errors import ConfigError, LockstepError
from trainer.exact.shards import is_shard, part_like
from trainer.storage.files import REPLACED, make_folder, new_directory, write_text
from trainer.storage.sha256 import file_sha256
from trainer.storage.snapshot import MANIFEST_FILE, Snapshot, Tensors
from trainer.storage.stateful import check_name, load_state

# By metric: totals and weights, as `Totals.sums` has them.
MetricSums = dict[str, tuple[list[float], list[float]]]

# The files of a checkpoint.
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
# Names the files of what a run keeps besides weights and optimizer state; see `trainer.core.further`.
FURTHER = "further"

# What reading a damaged file may raise.
READ_ERRORS = (OSError, ValueError, KeyError, TypeError, SafetensorError)


@dataclass
class Progress:
    """How far a run is, besides its tensors. Plain values, stored as JSON."""

    step: int = 0
    samples_seen: int = 0
    seconds: float = 0.0
    best: float | None = None
    best_step: int = 0
    best_epoch: int = 0
    # The watched metric at each evaluation.
    history: list[float] = field(default_factory=list)
    interval: MetricSums = field(default_factory=dict)  # since the last logged row
    epoch: MetricSums = field(default_factory=dict)  # since the epoch began
    scaler: dict[str, Any] = field(default_factory=dict)
    # By fp16, whose gradient overflowed.
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    last_skipped_step: int = 0
    # What the run leaves out; see `trainer.storage.bad_samples`.
    bad_samples: list[list[Any]] = field(default_factory=list)
    # At an epoch's last step: its evaluation and its row are still to come.
    epoch_end_is_due: bool = False
    stopped_by: str = ""  # why the run has ended before its last step
    # At a step within an epoch: its evaluation is still to come.
    evaluation_is_due: bool = False
    rows: int = 0  # lines of metrics.jsonl
    wandb_id: str | None = None


@dataclass
class Checkpoint:
    """The contents of one checkpoint; `stateful` has other objects' `state_dict()`s, by name."""

    model: Tensors
    optimizer: Tensors
    optimizer_numbers: dict[str, Any]
    progress: Progress
    config: dict[str, Any]
    stateful: dict[str, dict[Any, Any]] = field(default_factory=dict)


def model_tensors(module: nn.Module) -> Tensors:
    """The module's own parameters and buffers, as a checkpoint names them."""
    tensors = {}
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, Tensor):
            # Else it is what `get_extra_state` returns, which is kept beside the weights.
            tensors[name] = tensor
    return tensors


def take(checkpoint: Checkpoint) -> Snapshot:
    """The files of a checkpoint. Raises `LockstepError` if a stateful object cannot be stored."""
    snapshot = Snapshot(checkpoint.progress.step)
    snapshot.files[MODEL_FILE] = checkpoint.model
    snapshot.files[OPTIMIZER_FILE] = checkpoint.optimizer
    state: dict[str, Any] = {
        "progress": asdict(checkpoint.progress),
        "optimizer": checkpoint.optimizer_numbers,
        "config": checkpoint.config,
    }
    if checkpoint.stateful:
        state["stateful"] = _names_of(checkpoint.stateful)
        for name in state["stateful"]:
            snapshot.add_state(name, checkpoint.stateful[name])
    private = holds_secret(checkpoint.config)
    snapshot.add_text(STATE_FILE, json.dumps(state), private=private)
    return snapshot


def write(directory: Path, snapshot: Snapshot, *, keep: int) -> Path:
    """Write a checkpoint, point `last` to it, and remove all but the newest `keep`; returns its path.

    Raises `OSError` if the disk refuses it. Then the checkpoints from before stay as they were.
    """
    name = f"step_{snapshot.step:08d}"
    path = make_folder(directory.parent, directory.name) / name
    with new_directory(path) as partial:
        snapshot.write(partial)
    write_text(directory / "last", path.name + "\n")
    _remove_old(directory, keep=keep, newest=path)
    return path


def newest_first(directory: Path) -> list[Path]:
    """The complete checkpoints in the order in which a resume tries them.

    First the one that `last` names, or by number if `last` is lost or damaged; then those before it, then any other.
    """
    checkpoints = {}
    for path in directory.glob(f"{REPLACED}step_*"):
        checkpoints[path.name.removeprefix(REPLACED)] = path
    for path in directory.glob("step_*"):
        checkpoints[path.name] = path
    pointer = directory / "last"
    names = sorted(checkpoints, reverse=True)
    last = pointer.read_text(errors="replace").strip() if pointer.is_file() else ""
    if last in checkpoints:
        earlier = [name for name in names if name < last]
        later = [name for name in names if name > last]
        names = [last, *earlier, *later]
    return [checkpoints[name] for name in names]


def latest(directory: Path) -> Path | None:
    """The checkpoint that a resume tries first; None if there is none."""
    return next(iter(newest_first(directory)), None)


def load_newest(paths: Sequence[Path]) -> tuple[Checkpoint, list[str]]:
    """The first of `paths` that can be read, and a note for each before it, which is renamed to `damaged_…`.

    Raises `LockstepError` if none can be read.
    """
    notes: list[str] = []
    problems: list[str] = []
    for path in paths:
        try:
            content = load(path)
        except LockstepError as error:
            problems.append(str(error))
            continue
        for damaged, problem in zip(paths, problems, strict=False):
            notes.append(f"{problem}: set aside as {_set_aside(damaged)}")
        return content, notes
    raise LockstepError(
        f"no checkpoint can be read: {'; '.join(problems)}. Start the run anew with run.resume=never"
    )


def _set_aside(path: Path) -> str:
    """Rename a damaged checkpoint, so that it is neither resumed from nor counted; returns its new name."""
    aside = path.with_name(f"damaged_{path.name.removeprefix(REPLACED)}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    return aside.name


def load(path: Path) -> Checkpoint:
    """Read a checkpoint. Raises `LockstepError` if a file is missing or its SHA-256 is not the manifest's."""
    try:
        verify(path)
        state = json.loads((path / STATE_FILE).read_text())
        return Checkpoint(
            model=load_file(path / MODEL_FILE),
            optimizer=load_file(path / OPTIMIZER_FILE),
            optimizer_numbers=state["optimizer"],
            progress=Progress(**state["progress"]),
            config=state["config"],
            stateful=_load_stateful(path, state),
        )
    except READ_ERRORS as error:
        raise LockstepError(f"{path} cannot be read ({error})") from error


def restore_model(module: nn.Module, tensors: Tensors) -> None:
    """Load a checkpoint's weights and buffers into the module. Raises `ConfigError` unless they fit exactly.

    What `get_extra_state` returns stays as it is.
    """
    try:
        module.load_state_dict(with_extra_state(module, tensors))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ConfigError("model", f"is not the checkpoint's: {reason}") from None


def with_extra_state(module: nn.Module, tensors: Tensors) -> dict[str, Any]:
    """A `state_dict` of `tensors` and of what the module returns by `get_extra_state`, which loading asks for.

    Of a parameter that is shared out over the ranks it has this rank's part.
    """
    values: dict[str, Any] = dict(tensors)
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            values.setdefault(name, value)
        elif is_shard(value) and name in values:
            values[name] = _part_of_same(value, values[name])
    return values


def _part_of_same(shard: Tensor, value: Tensor) -> Tensor:
    """This rank's part of `value`; one of another shape stays as it is, for torch to name it."""
    if is_shard(value) or value.shape != shard.shape:
        return value
    return part_like(shard, value)


def _names_of(stateful: Mapping[str, Mapping[Any, Any]]) -> list[str]:
    """The names of stateful objects, in order. Raises `LockstepError` if two could not have files of their own."""
    names = sorted(stateful)
    names_without_case = {name.lower() for name in names}
    if len(names_without_case) < len(names):  # one file on a disk that ignores case
        raise LockstepError(
            f"the names of stateful objects differ in case only: {', '.join(names)}; rename one"
        )
    return names


def _load_stateful(path: Path, state: Mapping[str, Any]) -> dict[str, dict[Any, Any]]:
    names = state.get("stateful", [])  # absent in a checkpoint of an earlier version
    for name in names:
        check_name(name)  # a path would lead out of the checkpoint
    return {name: load_state(path, name) for name in names}


def verify(path: Path) -> None:
    """Raise unless every file in `path` is the one that its manifest records."""
    manifest = json.loads((path / MANIFEST_FILE).read_text())
    for name, sha256 in manifest["files"].items():
        if Path(name).name != name:
            raise LockstepError(
                f"{path / MANIFEST_FILE} names a file elsewhere, {name}"
            )
        if file_sha256(path / name) != sha256:
            raise LockstepError(
                f"{path / name} is not what was written (its SHA-256 differs from manifest.json's)"
            )


def _remove_old(directory: Path, *, keep: int, newest: Path) -> None:
    """Remove all but the last `keep` checkpoints, and never the newest.

    They are sorted by step: in a run that resumed from an earlier step, the newest may not have the highest one.
    """
    for path in sorted(directory.glob("step_*"))[:-keep]:
        if path != newest:
            shutil.rmtree(path)
