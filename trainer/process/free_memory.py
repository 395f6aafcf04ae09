"""How much memory is left, on a device or on this machine."""

from __future__ import annotations

from pathlib import Path

import torch

from trainer.process.device import device_module


def available_memory(device: torch.device) -> int | None:
    """Bytes that a program may still ask for on `device`; None where nobody says."""
    if device.type == "cpu":
        return _least(_of_machine(), _of_container())
    query = getattr(device_module(device), "mem_get_info", None)
    return None if query is None else int(query(device)[0])


def _least(*amounts: int | None) -> int | None:
    known = [amount for amount in amounts if amount is not None]
    return min(known, default=None)


def _of_machine() -> int | None:
    """What Linux expects to be able to give without swapping."""
    for line in _read(Path("/proc/meminfo")).splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def _of_container() -> int | None:
    """What a limit of the control group leaves (https://docs.kernel.org/admin-guide/cgroup-v2.html)."""
    group = Path("/sys/fs/cgroup")
    limit, used = _read(group / "memory.max"), _read(group / "memory.current")
    if not limit.isdigit() or not used.isdigit():
        return None
    return max(0, int(limit) - int(used) + _file_cache(group))


def _file_cache(group: Path) -> int:
    """Bytes of files that are kept as long as nobody needs the memory: they count as used."""
    for line in _read(group / "memory.stat").splitlines():
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
