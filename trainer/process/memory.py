"""Host memory that kernels on the CPU free stays with the process, for the next step to take."""

from __future__ import annotations

import ctypes
import os
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt's numbers, https://man7.org/linux/man-pages/man3/mallopt.3.html
KEPT, MAPPED = 2**31 - 1, 2**30  # bytes
CHOSEN = ("GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")  # by whoever launches


def keep_freed_memory() -> None:
    """Have glibc keep freed activations, up to 2 GiB, instead of giving them back to the system.

    Each step would else have them mapped and zeroed anew, page by page. Does nothing where malloc is another one, or
    is tuned already.
    """
    if sys.platform == "linux" and not any(os.environ.get(name) for name in CHOSEN):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(MMAP_THRESHOLD, MAPPED)
            mallopt(TRIM_THRESHOLD, KEPT)
