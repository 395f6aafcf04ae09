"""How much main memory this process may still use."""

from __future__ import annotations

from pathlib import Path

from trainer.process import launcher

CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Bytes of main memory for one rank: half of what is available, shared by the ranks of the machine."""
    import psutil  # type: ignore[import-untyped]

    available = int(psutil.virtual_memory().available)
    limit = _read_text(CGROUP / "memory.max")
    if limit.isdecimal():  # a container's own limit; "max" for none
        used = int(_read_text(CGROUP / "memory.current"))
        available = min(available, int(limit) - used)
    return available // (2 * launcher.local_world_size())


def _read_text(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else ""
