"""What a run stands on beside its config: versions, device, processes, code. Kept as `environment.json`."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from trainer.data.datasets import Datasets
from trainer.process.ranks import Ranks
from trainer.storage.fingerprint import fingerprint

PACKAGES = ("torch", "torchvision", "accelerate", "numpy")


def environment(ranks: Ranks, data: Datasets) -> dict[str, Any]:
    """Plain values, those that may change a run's bits among them, and the fingerprints of its data."""
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        **_device(ranks.device),
        "processes": ranks.count,
        "threads": torch.get_num_threads(),
        "code": _commit(),
        "data": {"train": fingerprint(data.train), "val": None if data.val is None else fingerprint(data.val)},
    }


def _device(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        capability = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else None
        return {"device": device.type, "instructions": capability, "machine": platform.machine()}
    return {
        "device": torch.cuda.get_device_name(device),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the working directory's repository, with a mark where files have changed since."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            cwd=Path.cwd(),
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
