"""Image files of noise, for tests of how they are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image


def write_noise(
    root: Path, count: int, sides: Callable[[np.random.Generator, int], tuple[int, int]]
) -> Path:
    """PNG files `0.png`, …, of one class in `train` and `val` of `root`; `sides` gives height and width of each."""
    draws = np.random.default_rng(0)
    for part in ("train", "val"):
        folder = root / part / "daisy"
        folder.mkdir(parents=True)
        for index in range(count):
            height, width = sides(draws, index)
            pixels = draws.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    return root
