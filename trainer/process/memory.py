"""How malloc treats memory that the CPU's kernels free. A setting of the whole process, so entry points make it."""

from __future__ import annotations

import ctypes
import os
import sys

# mallopt's parameters, from https://man7.org/linux/man-pages/man3/mallopt.3.html
TRIM_THRESHOLD = -1
MMAP_THRESHOLD = -3
MOST_BYTES_KEPT = 2**31 - 1  # mallopt takes a C int
# Bytes: the most that is asked for, and the most that glibc before 2.35 takes.
LARGEST_BLOCK_KEPT = (2**30, 2**25)
# Whoever sets one of these has chosen another malloc, or other settings of it.
USER_SETTINGS = (
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
)


def keep_freed_memory(device_type: str) -> None:
    """For a run on the CPU, let glibc keep up to 2 GiB of freed memory for the next step.

    By default it returns large activations to the system, which maps and zeroes their pages anew in every step. Does
    nothing for a run on another device, if malloc is not glibc's, or if the user has tuned it.
    """
    if device_type != "cpu":
        return
    if sys.platform != "linux" or any(os.environ.get(name) for name in USER_SETTINGS):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    # The second alone would fix the first at its default: every block of 128 KiB would be mapped anew.
    if any(mallopt(MMAP_THRESHOLD, size) for size in LARGEST_BLOCK_KEPT):
        mallopt(TRIM_THRESHOLD, MOST_BYTES_KEPT)
