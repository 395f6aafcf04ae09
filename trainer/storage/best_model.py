"""The best model of a run: complete or absent, verified when read.

best/            model.safetensors  config.yaml  metrics.json  signature.json  manifest.json
                 and, if a loss or the like has a state, further.safetensors  further.json
.best.previous/  the one before, until the next checkpoint knows the newer one
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from trainer.errors import LockstepError
from trainer.storage.checkpoint import FURTHER, MODEL_FILE, READ_ERRORS, verify
from trainer.storage.files import new_directory
from trainer.storage.snapshot import MANIFEST_FILE, Snapshot, Tensors
from trainer.storage.stateful import load_state

CURRENT = "best"
PREVIOUS = ".best.previous"
NEXT = ".best.next"  # while it is written

METRICS_FILE = "metrics.json"


def take(
    model: Tensors,
    config_yaml: str,
    metrics: Mapping[str, float],
    signature: Mapping[str, Any],
    *,
    private: bool,
    further: Mapping[str, Any] | None = None,
) -> Snapshot:
    """The files of a best model; `further` is state that is not among its tensors, such as a loss's own.

    A `private` config has secrets, and is for its owner's eyes alone.
    """
    snapshot = Snapshot(int(metrics["step"]))
    snapshot.files[MODEL_FILE] = model
    snapshot.add_text("config.yaml", config_yaml, private=private)
    snapshot.add_json(METRICS_FILE, dict(metrics))
    snapshot.add_json("signature.json", dict(signature))
    if further:
        snapshot.add_state(FURTHER, further)
    return snapshot


def write(run: Path, snapshot: Snapshot, *, saved_best_step: int | None = None) -> None:
    """Replace `best/`.

    The one before becomes `.best.previous`, which `restore` needs after an interruption. If `.best.previous` is of
    `saved_best_step`, the best model that the newest checkpoint knows, it stays.
    """
    best, previous, following = run / CURRENT, run / PREVIOUS, run / NEXT
    with new_directory(following) as partial:
        snapshot.write(partial)
    if best.exists():
        if saved_best_step and _step_of(previous) == saved_best_step:
            shutil.rmtree(best)
        else:
            shutil.rmtree(previous, ignore_errors=True)
            # Until the new one is in its place, `directory` finds it there.
            best.rename(previous)
    following.rename(best)


def restore(run: Path, step: int) -> None:
    """Make `best/` the one of `step`, the best at a checkpoint that the run resumes from.

    A run may have been interrupted between a newer best model and its next checkpoint; it will find that model again.
    """
    best, previous = run / CURRENT, run / PREVIOUS
    if _step_of(best) != step and _step_of(previous) == step:
        shutil.rmtree(best, ignore_errors=True)
        previous.rename(best)


def directory(run: Path) -> Path:
    """`best/`, or the previous one if the run was interrupted while it replaced it. Raises `LockstepError` if none."""
    for path in (run / CURRENT, run / PREVIOUS):
        if path.is_dir():
            return path
    raise LockstepError(
        f"{run} has no best model yet: it is kept at a run's first evaluation"
    )


def load(run: Path) -> tuple[Tensors, dict[str, float]]:
    """The best model's tensors and metrics. Raises `LockstepError` if there is none, or it is not what was written."""
    best = directory(run)
    try:
        if (best / MANIFEST_FILE).exists():  # absent in a run of an earlier version
            verify(best)
        tensors = load_file(best / MODEL_FILE)
        metrics = json.loads((best / METRICS_FILE).read_text())
    except READ_ERRORS as error:
        raise LockstepError(f"{best} cannot be read ({error})") from error
    return tensors, metrics


def load_further(run: Path) -> dict[str, Any]:
    """What `take` was given as `further`; {} if nothing. Raises `LockstepError` if it cannot be read."""
    best = directory(run)
    if not (best / f"{FURTHER}.json").exists():
        return {}
    try:
        return load_state(best, FURTHER)
    except READ_ERRORS as error:
        raise LockstepError(f"{best} cannot be read ({error})") from error


def _step_of(path: Path) -> int | None:
    """The step of a best model, None if there is none or its metrics cannot be read."""
    try:
        return int(json.loads((path / METRICS_FILE).read_text())["step"])
    except READ_ERRORS:
        return None
