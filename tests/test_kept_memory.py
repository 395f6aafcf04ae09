"""What malloc is asked for: each glibc has a largest block that it keeps."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.process.memory import (
    MMAP_THRESHOLD,
    MOST_BYTES_KEPT,
    TRIM_THRESHOLD,
    USER_SETTINGS,
    keep_freed_memory,
)


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
@pytest.mark.parametrize(
    ("largest", "expected"),
    [
        (2**40, {MMAP_THRESHOLD: 2**30, TRIM_THRESHOLD: MOST_BYTES_KEPT}),
        (2**25, {MMAP_THRESHOLD: 2**25, TRIM_THRESHOLD: MOST_BYTES_KEPT}),
        (2**17, {}),  # of no use by itself
    ],
)
def test_malloc_keeps_what_it_can(
    largest: int, expected: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[int, int] = {}

    def mallopt(parameter: int, value: int) -> int:
        """As glibc's: 0 for a block that is too large, and then nothing is set."""
        if parameter == MMAP_THRESHOLD and value > largest:
            return 0
        settings[parameter] = value
        return 1

    for name in USER_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    library: Any = SimpleNamespace(mallopt=mallopt)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    keep_freed_memory("cuda")
    assert not settings
    keep_freed_memory("cpu")
    assert settings == expected
