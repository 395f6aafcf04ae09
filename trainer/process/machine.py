"""What a rank runs on: its machine, device, driver and library versions."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import time
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from trainer.process.device import device_name, total_memory

# Pillow and TorchCodec decode images.
PACKAGES = ("torch", "torchvision", "accelerate", "numpy", "pillow", "torchcodec")
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
GIB = 2**30


def describe_rank(device: torch.device, directory: Path) -> dict[str, Any]:
    """Plain values that may differ between the ranks of a run; `directory` is where it is to be written.

    `clock` is the time of the call, in seconds since 1970.
    """
    values: dict[str, Any] = {"clock": time.time(), "host": socket.gethostname()}
    values |= package_versions()
    values |= describe_device(device)
    values["memory"] = _device_memory(device)
    values["driver"] = _nvidia_driver()
    values["nccl"] = _nccl_version(device)
    free = free_bytes(directory)
    values["free_disk"] = None if free is None else f"{free / GIB:.1f} GiB"
    return values


def usable_processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def package_versions() -> dict[str, str | None]:
    """The versions of Python and of what computes; None for a package that is not installed."""
    versions = {package: _version(package) for package in PACKAGES}
    return {"python": platform.python_version(), **versions}


@cache  # reading a package's metadata takes 10 ms, and a run asks twice
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe_device(device: torch.device) -> dict[str, Any]:
    """The device's name, and what else decides which kernels it runs."""
    if device.type == "cuda":
        return {
            "device": device_name(device),
            "cuda": torch.version.cuda or torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        }
    instructions = None
    if device.type == "cpu":
        # AVX2 and AVX512 kernels round differently.
        instructions = torch.backends.cpu.get_cpu_capability()
    return {
        "device": device_name(device),
        "instructions": instructions,
        "machine": platform.machine(),
    }


def _device_memory(device: torch.device) -> str | None:
    """A GPU's whole memory; None for the host's, which is shared by the ranks of a machine."""
    total = total_memory(device)
    return None if total is None else f"{total / GIB:.1f} GiB"


def _nvidia_driver() -> str | None:
    try:
        first_line = NVIDIA_DRIVER.read_text().splitlines()[0]
    except (OSError, IndexError):
        return None
    versions = [
        word for word in first_line.split() if word[0].isdigit() and "." in word
    ]
    return versions[0] if versions else None


def _nccl_version(device: torch.device) -> str | None:
    if device.type != "cuda" or not torch.distributed.is_nccl_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]


def free_bytes(directory: Path) -> int | None:
    """What is free on the disk where `directory` is, or will be once it is made."""
    for path in (directory, *directory.absolute().parents):
        if path.is_dir():
            return shutil.disk_usage(path).free
    return None
