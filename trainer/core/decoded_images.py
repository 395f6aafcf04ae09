"""`data.short_side` and `data.cache=decoded` for the image folders of a run, whichever of its sets they are."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from trainer.config.data_section import DataConfig
from trainer.core.cache_progress import BuildProgress, NoProgress
from trainer.data.datasets import Datasets, MapDataset
from trainer.data.folder import ImageFolder
from trainer.data.image_store import ImageStore
from trainer.data.names import sort_key
from trainer.data.short_side import choose_short_side
from trainer.errors import ConfigError
from trainer.process import launcher
from trainer.process.machine import usable_processors
from trainer.process.ranks import Ranks
from trainer.storage.cache_build import open_or_build
from trainer.storage.decoded_cache import CacheSource

MB = 10**6


def with_decoded_images(section: DataConfig, ranks: Ranks, data: Datasets) -> Datasets:
    """`data` with images of at most `data.short_side`, read from the cache if there is to be one.

    Every rank calls it: those of a machine make the cache together. Raises `ConfigError`, `DataError`.
    """
    side = choose_short_side(section)
    is_cached = section.cache == "decoded"
    # By identity: several parts of the data may read one folder, and then go on to share it.
    folders: dict[int, ImageFolder] = {}
    for part in _parts(data):
        if isinstance(part, ImageFolder):
            folders[id(part)] = part
    if not folders or (side.pixels is None and not is_cached):
        return data
    small = {}
    for number, folder in folders.items():
        small[number] = folder.with_short_side(side.pixels)
    notes = [f"short side {side.pixels} (data.short_side)"]
    if side.pixels is None:
        notes = [f"as they are: {side.reason}"]
    if is_cached:
        assert section.cache_dir is not None, "the config is checked"
        cache_dir = Path(section.cache_dir).expanduser()
        notes += _read_from_stores(small, cache_dir, ranks)
    return _replaced(data, small, " · ".join(notes))


def _read_from_stores(
    folders: dict[int, ImageFolder], cache_dir: Path, ranks: Ranks
) -> list[str]:
    """Let each of `folders` read from the cache of its root; returns where those are, in words."""
    by_root: dict[Path, dict[int, ImageFolder]] = {}
    for number, folder in folders.items():
        by_root.setdefault(folder.root, {})[number] = folder
    # Before the first is made: a mistake is told at once, and not after minutes of decoding.
    for root in by_root:
        _check_apart(cache_dir, root)
    notes = []
    for of_root in by_root.values():
        store = _open_store(of_root.values(), cache_dir, ranks)
        for number, folder in of_root.items():
            folders[number] = folder.with_store(store)
        notes.append(f"decoded in {store.folder}, {store.size / MB:,.0f} MB")
    return notes


def _check_apart(cache_dir: Path, root: Path) -> None:
    """Raise `ConfigError` for a cache among the images, where the next run would take it for a class without images."""
    folder, images = cache_dir.resolve(), root.resolve()
    if not folder.is_relative_to(images):
        return
    is_hidden = any(part.startswith(".") for part in folder.relative_to(images).parts)
    if not is_hidden:  # what is hidden is no class
        raise ConfigError(
            "data.cache_dir",
            f"{cache_dir} lies within the images of {root}, whose folders are classes; name a folder elsewhere",
        )


def _open_store(
    folders: Collection[ImageFolder], cache_dir: Path, ranks: Ranks
) -> ImageStore:
    """The cache of all images of one root: how its parts share them out makes no difference."""
    first = next(iter(folders))
    paths: set[str] = set()
    for folder in folders:
        paths.update(folder.paths)
    source = CacheSource(
        first.root,
        sorted(paths, key=sort_key),
        first.reading,
        first.decode,
    )
    threads = usable_processors() // launcher.local_world_size()
    progress = BuildProgress() if ranks.is_main else NoProgress()
    return open_or_build(cache_dir, source, threads, progress)


def _parts(data: Datasets) -> list[MapDataset | None]:
    return [data.train, data.val, *data.named.values(), data.test]


def _replaced(data: Datasets, folders: dict[int, ImageFolder], images: str) -> Datasets:
    def new(part: MapDataset) -> MapDataset:
        return folders.get(id(part), part)

    return replace(
        data,
        train=new(data.train),
        val=None if data.val is None else new(data.val),
        named={name: new(part) for name, part in data.named.items()},
        test=None if data.test is None else new(data.test),
        images=images,
    )
