"""Data that come in their own order, one after the other, and what to give instead: samples are read by number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

# What holds another data set: `Subset`, and most wrappers of one's own.
DEEPEST_WRAPPING = 5


def way_out(data: Any) -> str:
    """What to give instead of a stream, a loader or a generator; "" for what is none of them."""
    for _ in range(DEEPEST_WRAPPING):
        advice = _advice(data)
        if advice:
            return advice
        is_of_splits = isinstance(data, Mapping) and len(data) > 0
        data = next(iter(data.values())) if is_of_splits else _wrapped(data)
    return ""


def _wrapped(data: Any) -> Any:
    return getattr(data, "dataset", None)


def _advice(data: Any) -> str:
    package = type(data).__module__.partition(".")[0]
    if isinstance(data, DataLoader):
        return (
            "Give the loader's data set, `loader.dataset`: batch.size, data.workers and run.seed do what the loader "
            "would"
        )
    # Before the general case, since each has a form of its own that is read by number.
    if package == "datasets" and type(data).__name__.startswith("Iterable"):
        return (
            "Load it without streaming=True, or write it to a disk once, by save_to_disk or to_parquet, and open that: "
            "see docs/map-style.md"
        )
    if package == "webdataset":
        return (
            "Read the same tar files by an index of their samples, as examples/formats/tar_shards.py does: see "
            "docs/map-style.md"
        )
    if isinstance(data, IterableDataset):
        return "Give a data set that reads any sample by its number, from an index of its files: see docs/map-style.md"
    if isinstance(data, Iterator):
        return (
            "A generator gives its samples once: give a list of them, or a data set that reads any sample by its "
            "number"
        )
    return ""
