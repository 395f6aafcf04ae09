"""What W&B is handed beside numbers: the best model, images, tables, and where a run's files lie."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from trainer.config.secrets import redacted

if TYPE_CHECKING:
    from trainer.reporting.wandb.histograms import Histogram


def best_model(directory: Path, run_id: str) -> tuple[Any, list[str]] | None:
    """The artifact of a run's best model, with its metrics and redacted config, and its aliases; None without one.

    The files are not copied: they are sent from where they lie.
    """
    import wandb

    best = directory / "best"
    if not best.is_dir():
        return None
    row = json.loads((best / "metrics.json").read_text())
    config = redacted(yaml.safe_load((best / "config.yaml").read_text()))
    public = directory / "wandb" / "best_config.yaml"
    public.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    artifact = wandb.Artifact(f"model-{run_id}", type="model", metadata={**row, "config": config})
    for file, name in ((best / "model.safetensors", None), (best / "metrics.json", None), (public, "config.yaml")):
        artifact.add_file(str(file), name=name, policy="immutable", skip_cache=True)
    return artifact, ["best", f"epoch-{int(row['epoch'])}"]


def shown(figures: Mapping[str, Path]) -> dict[str, Any]:
    """PNG files as images, CSV files as tables, under their names."""
    return {f"figures/{name}": _figure(path) for name, path in figures.items()}


def _figure(path: Path) -> Any:
    import wandb

    if path.suffix == ".csv":
        with path.open(newline="") as file:
            heading, *rows = csv.reader(file)
        columns = [_numbers(column) for column in zip(*rows, strict=True)]
        return wandb.Table(columns=[*heading], data=[list(row) for row in zip(*columns, strict=True)])
    return wandb.Image(str(path))


def histograms(taken: Mapping[str, Histogram]) -> dict[str, Any]:
    import wandb

    return {name: wandb.Histogram(np_histogram=(np.array(a), np.array(b))) for name, (a, b) in taken.items()}


def sessions(directory: Path, *, unsent: bool) -> list[Path]:
    """The `.wandb` files of a run's sessions, oldest first; only those with something left to send, if `unsent`."""
    files = [
        file
        for file in directory.glob("wandb/*run-*/*.wandb")
        if not file.parent.is_symlink() and not (unsent and _marker(file).exists())
    ]
    return sorted(files, key=lambda file: file.parent.name.removeprefix("offline-"))


def is_offline(file: Path) -> bool:
    return file.parent.name.startswith("offline-")


def mark_sent(files: Iterable[Path]) -> None:
    """Have sessions count as sent, for `wandb sync` too."""
    for file in files:
        _marker(file).touch()


def _marker(file: Path) -> Path:
    return file.with_suffix(".wandb.synced")


def _numbers(column: Sequence[str]) -> Sequence[str | float]:
    try:
        return [float(cell) for cell in column]
    except ValueError:
        return column
