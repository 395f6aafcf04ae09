"""What a run depends on besides its config: versions, device, processes, code. Kept as `environment.json`."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from trainer.data.datasets import Datasets
from trainer.process.ranks import Ranks
from trainer.storage.fingerprint import fingerprint

PACKAGES = ("torch", "torchvision", "accelerate", "numpy")
GIT_TIMEOUT = 5  # seconds

# `describe` gives the commit and "-dirty"; tags are excluded, since they would replace the commit.
GIT_COMMAND = ("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def environment(ranks: Ranks, data: Datasets) -> dict[str, Any]:
    """Plain values: whatever may change a run's bits, and the fingerprints of its data."""
    values: dict[str, Any] = {"python": platform.python_version()}
    for package in PACKAGES:
        values[package] = _package_version(package)
    values |= _describe_device(ranks.device)
    values["processes"] = ranks.count
    values["threads"] = torch.get_num_threads()
    values["code"] = _git_commit()
    values["data"] = {
        "train": fingerprint(data.train),
        "val": None if data.val is None else fingerprint(data.val),
    }
    return values


def _describe_device(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        return {
            "device": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        }
    instructions = None
    if device.type == "cpu":
        instructions = torch.backends.cpu.get_cpu_capability()  # AVX2 and AVX512 kernels round differently
    return {"device": device.type, "instructions": instructions, "machine": platform.machine()}


def _package_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the repository around the working directory, with "-dirty" if files have changed since.

    None if there is no repository or no git.
    """
    # Without optional locks, `describe` does not rewrite the index, which another git may be using.
    variables = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        process = subprocess.run(
            GIT_COMMAND, capture_output=True, text=True, timeout=GIT_TIMEOUT, check=True, env=variables
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return process.stdout.strip()
