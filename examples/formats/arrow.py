"""Hugging Face's data sets, Arrow files or Parquet, read by number. Needs the package `datasets`.

Each is memory-mapped, so any row is read without the others, and the processes of a machine share the pages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def from_disk(root: str, split: str) -> Any:
    """The data set that `save_to_disk` wrote to `root/train` or `root/val`.

    Its rows, `{"image": …, "label": …}`, are samples as they are, and its ClassLabel names the classes.
    """
    from datasets import load_from_disk

    return load_from_disk(str(Path(root).expanduser() / split))


def from_parquet(root: str, split: str, cache_dir: str | None = None) -> Any:
    """The rows of `root/train*.parquet` or `root/val*.parquet`, in the order of the files' names.

    Parquet is compressed in blocks, so it is written once as Arrow files below `cache_dir` (by default the library's
    own folder), and these are read.
    """
    from datasets import Dataset

    files = sorted(map(str, Path(root).expanduser().glob(f"{split}*.parquet")))
    if not files:
        raise ValueError(f"there is no {split}*.parquet in {root}")
    return Dataset.from_parquet(files, cache_dir=cache_dir)
