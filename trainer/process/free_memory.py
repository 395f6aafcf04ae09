"""How much memory is left, on a device or on this machine."""

from __future__ import annotations

from pathlib import Path

import torch

from trainer.process import launcher
from trainer.process.device import device_module

# A container's own control group.
CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int | None:
    """Bytes that a program may still ask for on `device`; None where nobody says."""
    if device.type == "cpu":
        return free_main_memory()
    query = getattr(device_module(device), "mem_get_info", None)
    return None if query is None else int(query(device)[0])


def free_main_memory() -> int:
    """Bytes that a program may still ask for without swapping, within its container's limit."""
    import psutil  # type: ignore[import-untyped]

    machine = int(psutil.virtual_memory().available)
    container = _free_in_container()
    return machine if container is None else min(machine, container)


def share_of_main_memory() -> int:
    """Bytes of main memory for one rank: half of what is free, shared by the ranks of the machine."""
    return free_main_memory() // (2 * launcher.local_world_size())


def _free_in_container() -> int | None:
    """What a limit of the control group leaves (https://docs.kernel.org/admin-guide/cgroup-v2.html)."""
    limit, used = _read(CGROUP / "memory.max"), _read(CGROUP / "memory.current")
    if not limit.isdigit() or not used.isdigit():  # "max" is no limit
        return None
    return max(0, int(limit) - int(used) + _file_cache())


def _file_cache() -> int:
    """Bytes of files that are kept as long as nobody needs the memory: they count as used."""
    for line in _read(CGROUP / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == "inactive_file":
            return int(value)
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def describe_bytes(count: int) -> str:
    """`184 MB`: a size as a person reads it."""
    if count < 10**9:
        return f"{count / 10**6:,.1f} MB"
    return f"{count / 10**9:,.1f} GB"
