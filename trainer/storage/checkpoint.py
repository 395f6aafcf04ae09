"""Checkpoints: complete or absent, verified when read, free of ranks and of random state.

    checkpoints/step_00000023/   model.safetensors  optimizer.safetensors  state.json  manifest.json
                                 and, for each stateful object, <name>.safetensors  <name>.json
    checkpoints/last             a text file: the name of the newest complete one
    best/                        model.safetensors  config.yaml  metrics.json  signature.json

A run's position is its step number, and all that is random has a key, so this is all there is to save.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.errors import ConfigError, LockstepError
from trainer.storage.files import file_sha256, new_directory, write_text
from trainer.storage.stateful import load_state, save_state, write_tensors

Tensors = dict[str, Tensor]


@dataclass
class Progress:
    """How far a run is, beside its tensors. Plain values, kept as JSON."""

    step: int = 0
    samples_seen: int = 0
    seconds: float = 0.0
    best: float | None = None
    best_step: int = 0
    best_epoch: int = 0
    history: list[float] = field(default_factory=list)  # the watched metric at each evaluation
    interval: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)  # sums since the last logged row
    epoch: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)  # sums since the epoch began
    scaler: dict[str, Any] = field(default_factory=dict)
    rows: int = 0  # lines of metrics.jsonl
    wandb_id: str | None = None


@dataclass
class Checkpoint:
    """What one checkpoint holds: the model, the optimizer's state, progress, and the config it was made under."""

    model: Tensors
    optimizer: Tensors
    optimizer_numbers: dict[str, Any]
    progress: Progress
    config: dict[str, Any]
    stateful: dict[str, dict[Any, Any]] = field(default_factory=dict)  # other objects' `state_dict()`s, by name


def snapshot(module: nn.Module) -> Tensors:
    """A copy of the module's parameters and buffers on the CPU."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in module.state_dict().items()}


def save(directory: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write a checkpoint, point `last` to it, and remove all but the newest `keep`."""
    target = directory / f"step_{checkpoint.progress.step:08d}"
    with new_directory(target) as partial:
        write_tensors(partial / "model.safetensors", checkpoint.model)
        write_tensors(partial / "optimizer.safetensors", checkpoint.optimizer)
        state: dict[str, Any] = {
            "progress": asdict(checkpoint.progress),
            "optimizer": checkpoint.optimizer_numbers,
            "config": checkpoint.config,
        }
        if checkpoint.stateful:
            state["stateful"] = _save_stateful(partial, checkpoint.stateful)
        (partial / "state.json").write_text(json.dumps(state))
        files = {file.name: file_sha256(file) for file in sorted(partial.iterdir())}
        manifest = {"step": checkpoint.progress.step, "files": files}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=2))
    write_text(directory / "last", target.name + "\n")
    for old in sorted(directory.glob("step_*"))[:-keep]:
        if old != target:
            shutil.rmtree(old)
    return target


def latest(directory: Path) -> Path | None:
    """The newest complete checkpoint, by `last`, or by name where that was lost."""
    kept = {path.name: path for path in directory.glob("step_*")}
    pointer = directory / "last"
    named = pointer.read_text(errors="replace").strip() if pointer.is_file() else ""
    return kept.get(named) or max(kept.values(), default=None)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint, each file checked against its digest."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name, digest in manifest["files"].items():
            if file_sha256(path / name) != digest:
                raise LockstepError(
                    f"{path / name} is not what was written (its SHA-256 differs from manifest.json's); "
                    f"remove {path} to go on from the checkpoint before it"
                )
        state = json.loads((path / "state.json").read_text())
        return Checkpoint(
            model=load_file(path / "model.safetensors"),
            optimizer=load_file(path / "optimizer.safetensors"),
            optimizer_numbers=state["optimizer"],
            progress=Progress(**state["progress"]),
            config=state["config"],
            stateful={name: load_state(path, name) for name in state.get("stateful", ())},
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise LockstepError(
            f"{path} cannot be read ({error}); remove it to go on from the checkpoint before it"
        ) from error


def restore_model(module: nn.Module, tensors: Tensors) -> None:
    """Give the module a checkpoint's weights and buffers, all of them."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise ConfigError("model", f"is not the checkpoint's: {' '.join(str(error).split())}") from None


def save_best(
    run: Path, model: Tensors, config_yaml: str, metrics: Mapping[str, float], signature: Mapping[str, Any]
) -> None:
    """Replace `best/`. The one before stays as `.best.previous` until the next, should the run be cut off here."""
    best, previous = run / "best", run / ".best.previous"
    with new_directory(run / ".best.next") as partial:
        write_tensors(partial / "model.safetensors", model)
        (partial / "config.yaml").write_text(config_yaml)
        (partial / "metrics.json").write_text(json.dumps(dict(metrics), indent=2) + "\n")
        (partial / "signature.json").write_text(json.dumps(dict(signature), indent=2) + "\n")
    if best.exists():
        shutil.rmtree(previous, ignore_errors=True)
        best.rename(previous)
    (run / ".best.next").rename(best)


def restore_best(run: Path, step: int) -> None:
    """Make `best/` the one of `step`, as a checkpoint knows it: a run cut off after a newer one does it over."""
    best, previous = run / "best", run / ".best.previous"
    if _best_step(best) != step and _best_step(previous) == step:
        shutil.rmtree(best, ignore_errors=True)
        previous.rename(best)


def _best_step(path: Path) -> int | None:
    try:
        return int(json.loads((path / "metrics.json").read_text())["step"])
    except (OSError, ValueError, KeyError):
        return None


def best_directory(run: Path) -> Path:
    """Where the best model is: `best/`, or the one before where the run was cut off while replacing it."""
    best = next((path for path in (run / "best", run / ".best.previous") if path.is_dir()), None)
    if best is None:
        raise LockstepError(f"{run} has no best model yet: it is kept at a run's first evaluation")
    return best


def load_best(run: Path) -> tuple[Tensors, dict[str, float]]:
    """The best model's tensors and metrics."""
    best = best_directory(run)
    try:
        return load_file(best / "model.safetensors"), json.loads((best / "metrics.json").read_text())
    except (OSError, ValueError, SafetensorError) as error:
        raise LockstepError(f"{best} cannot be read ({error})") from error


def _save_stateful(directory: Path, stateful: Mapping[str, Mapping[Any, Any]]) -> list[str]:
    """Write each object's state to files of its own; returns the names."""
    names = sorted(stateful)
    folded = [name.lower() for name in names]
    if len(set(folded)) < len(names):  # one file on a disk that ignores case
        raise LockstepError(f"the names of stateful objects differ in case only: {', '.join(names)}; rename one")
    for name in names:
        save_state(directory, name, stateful[name])
    return names
