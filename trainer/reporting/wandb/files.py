"""What W&B receives besides numbers: the best model, images and tables; and where a run's W&B files are."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from trainer.config.secrets import redacted
from trainer.config.yaml_dump import to_yaml


class Histogram(NamedTuple):
    """The `counts` of a histogram's bins, and their `edges`, one more than bins."""

    counts: list[float]
    edges: list[float]


def best_model_artifact(directory: Path, run_id: str) -> tuple[Any, list[str]] | None:
    """The artifact of a run's best model, with its metrics and redacted config, and its aliases.

    None if the run has no best model yet. The files are uploaded from the run directory, without a copy.
    """
    import wandb

    best = directory / "best"
    if not best.is_dir():
        return None
    row = json.loads((best / "metrics.json").read_text())
    config = redacted(yaml.safe_load((best / "config.yaml").read_text()))
    # The run's own file keeps references to the environment; what leaves the machine is redacted as well.
    redacted_config = directory / "wandb" / "best_config.yaml"
    redacted_config.write_text(to_yaml(config, sort_keys=False, allow_unicode=True))
    artifact = wandb.Artifact(
        f"model-{run_id}", type="model", metadata={**row, "config": config}
    )
    # The cache would copy the model into the user's home.
    files = {
        "model.safetensors": best / "model.safetensors",
        "metrics.json": best / "metrics.json",
        "config.yaml": redacted_config,
    }
    for name, path in files.items():
        artifact.add_file(str(path), name=name, policy="immutable", skip_cache=True)
    epoch = int(row["epoch"])
    return artifact, ["best", f"epoch-{epoch}"]


def wrap_figures(figures: Mapping[str, Path]) -> dict[str, Any]:
    """PNG files as images and CSV files as tables, under `figures/` and their names."""
    return {f"figures/{name}": _wrap_figure(path) for name, path in figures.items()}


def _wrap_figure(path: Path) -> Any:
    import wandb

    if path.suffix != ".csv":
        return wandb.Image(str(path))
    with path.open(newline="") as file:
        heading, *rows = csv.reader(file)
    # W&B gives each column one type, so a column is either numbers or text.
    columns = [_to_numbers(column) for column in zip(*rows, strict=True)]
    return wandb.Table(
        columns=[*heading], data=[list(row) for row in zip(*columns, strict=True)]
    )


def _to_numbers(column: Sequence[str]) -> Sequence[str | float]:
    """The cells as numbers if all of them are, else unchanged."""
    try:
        return [float(cell) for cell in column]
    except ValueError:
        return column


def wrap_histograms(histograms: Mapping[str, Histogram]) -> dict[str, Any]:
    import wandb

    wrapped = {}
    for name, (counts, edges) in histograms.items():
        wrapped[name] = wandb.Histogram(
            np_histogram=(np.array(counts), np.array(edges))
        )
    return wrapped


def sessions(directory: Path, *, unsent: bool) -> list[Path]:
    """The `.wandb` files of a run's sessions, oldest first; if `unsent`, only those that are not sent completely."""
    files = []
    for file in directory.glob("wandb/*run-*/*.wandb"):
        if file.parent.is_symlink():  # W&B's link to the latest session
            continue
        if unsent and _sent_marker(file).exists():
            continue
        files.append(file)
    return sorted(files, key=_start_time)


def _start_time(file: Path) -> str:
    """The session's folder is named `[offline-]run-<date>_<time>-<id>`."""
    return file.parent.name.removeprefix("offline-")


def is_offline(file: Path) -> bool:
    return file.parent.name.startswith("offline-")


def mark_sent(files: Iterable[Path]) -> None:
    """Mark sessions as sent, in the way `wandb sync` does."""
    for file in files:
        _sent_marker(file).touch()


def _sent_marker(file: Path) -> Path:
    return file.with_suffix(".wandb.synced")
