"""Images in class folders, `root/train/<class>/…` and `root/val/<class>/…`, each decoded when it is read."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trainer.data.bad_samples import is_bad_sample
from trainer.data.decoding import IMAGE_TYPES
from trainer.data.image_list import JpegFile
from trainer.data.image_reading import ImageReading
from trainer.data.image_store import ImageStore
from trainer.data.names import check_utf8, normal_form, printable, sort_key
from trainer.errors import ConfigError, DataError, data_error, may_pass, nearest

# Images decoded before it is known whether they fit into the cache.
DECODED_AT_ONCE = 64

# Why a file is left out.
OTHER_TYPE = "not an image type that is read"
NO_CLASS = "not in a class folder"
LINK_UPWARDS = "a link to a folder that holds it"


class ImageFolder:
    """The images of one part. Sample `i` is the i-th path, sorted by class, then by path.

    `paths` are relative to `root`, with forward slashes; `targets` are their class ids. Where `reading` leaves bad
    files out, nothing but reading a sample itself fails for one.
    """

    # Decoded images in files, and the number there of each image here.
    _store: ImageStore | None = None
    _numbers: Sequence[int] = ()

    def __init__(
        self,
        root: Path,
        paths: list[str],
        targets: list[Any],
        reading: ImageReading | None = None,
    ) -> None:
        self.root = root
        self.reading = reading or ImageReading()
        self.paths = paths
        self.targets = targets
        # The first images, decoded; None for one that cannot be.
        self._cached: list[torch.Tensor | None] = []

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        """The image, uint8 `(3, H, W)`, turned upright by its EXIF data, and its class id.

        Raises `DataError` if the file cannot be decoded: a sample is never replaced by another.
        """
        target = self._target(index)
        image = self._kept(index)
        if image is None:
            return self.decode(self.paths[index]), target
        # A transform may write into its input.
        return image.clone(), target

    def read_only(self, index: int) -> tuple[torch.Tensor, Any]:
        """The same for who does not write into the image: it may lie in a cache."""
        target = self._target(index)
        image = self._kept(index)
        return (self.decode(self.paths[index]) if image is None else image), target

    def read_file(self, index: int) -> tuple[JpegFile | torch.Tensor, Any]:
        """A sample as the device takes it: a JPEG file that has been looked at, any other decoded, and its target.

        Raises `DataError` for a file that is of no use, as far as can be told without decoding it.
        """
        path = self.root / self.paths[index]
        return self.reading.read_for_device(path), self._target(index)

    def _kept(self, index: int) -> torch.Tensor | None:
        """The decoded image of a cache; None if there is none of it."""
        if self._store is not None:
            return self._store.image(self._numbers[index])
        return self._cached[index] if 0 <= index < len(self._cached) else None

    def with_short_side(self, pixels: int | None) -> ImageFolder:
        """The same images, the larger ones made so small."""
        smaller = copy.copy(self)
        smaller.reading = replace(self.reading, short_side=pixels)
        return smaller

    def with_store(self, store: ImageStore) -> ImageFolder:
        """The same images, read from `store`, which holds them all."""
        stored = copy.copy(self)
        stored._store = store
        stored._numbers = [store.numbers[path] for path in self.paths]
        return stored

    def cache_first(self, bytes_left: int) -> int:
        """Decode and keep as many of the first images as fit into `bytes_left`; returns the bytes still left.

        Forked loader processes share them.
        """
        if not bytes_left:
            return 0
        with ThreadPoolExecutor() as threads:  # decoding releases the interpreter lock
            for start in range(0, len(self), DECODED_AT_ONCE):
                paths = self.paths[start : start + DECODED_AT_ONCE]
                for image in threads.map(self._decode_to_keep, paths):
                    size = 0 if image is None else image.nbytes
                    if size > bytes_left:
                        return 0
                    bytes_left -= size
                    self._cached.append(image)
        return bytes_left

    def _decode_to_keep(self, path: str) -> torch.Tensor | None:
        try:
            return self.decode(path)
        except DataError as error:
            if self.reading.leaves_out and is_bad_sample(error):
                return None
            raise

    def select(self, ids: Sequence[int]) -> ImageFolder:
        """The images of some ids, in ascending order; those of them that are cached stay so."""
        chosen = copy.copy(self)
        chosen.paths = [self.paths[index] for index in ids]
        chosen.targets = [self.targets[index] for index in ids]
        count = len(self._cached)
        chosen._cached = [self._cached[index] for index in ids if index < count]
        if self._store is not None:
            chosen._numbers = [self._numbers[index] for index in ids]
        return chosen

    def _target(self, index: int) -> Any:
        return self.targets[index]

    def decode(self, path: str) -> torch.Tensor:
        """The image of a file, as `__getitem__` gives it. Raises `DataError`."""
        return self.reading.read(self.root / path)


# Not `torchvision.datasets.ImageFolder`: it puts the files of subfolders last, takes hidden folders for classes, skips
# folders that it may not read, and says nothing of the files that it leaves out. Sample ids depend on the order here.
def image_folders(
    root: Path,
    reading: ImageReading | None = None,
    *,
    folders: tuple[str, str] = ("train", "val"),
    needs_val: bool = True,
) -> tuple[ImageFolder, ImageFolder | None, list[str], str]:
    """Training and validation images, class names (the training folders, sorted), and a note on the files left out.

    Both `folders` are below `root`, "." for `root` itself. Without `needs_val`, no validation images are looked for.
    """
    train_folder, val_folder = folders
    check_root(root, f"{train_folder}/ and {val_folder}/")
    _check_below_root("train_folder", train_folder)
    _check_below_root("val_folder", val_folder)
    left_out = _nothing_left_out()
    train = _list_part(root, train_folder, left_out)
    for name, paths in train.items():
        if not paths:
            raise DataError(
                f"{printable(root / train_folder / name)} holds no {_types()}; add images or remove the folder"
            )
    classes = list(train)
    train_images = _image_folder(root, train, classes, reading)
    val_images = None
    if needs_val:
        val = _list_part(root, val_folder, left_out)
        for name in val:
            if name not in train:
                raise DataError(
                    f"{printable(root / val_folder / name)} is a class that {train_folder}/ lacks"
                    f"{nearest(name, train)}; add {printable(root / train_folder / name)} or remove the folder"
                )
        val_images = _image_folder(root, val, classes, reading)
    return train_images, val_images, classes, _notes(left_out)


def evaluation_folder(
    root: Path,
    part: str,
    classes: list[str],
    reading: ImageReading,
    *,
    key: str,
) -> tuple[ImageFolder, str]:
    """The images of `root/part/<class>/…` under the class ids of `classes`, and a note on the files left out.

    `key` is the set's in the config, for messages. Raises `DataError`.
    """
    folder = root / part
    if not folder.is_dir():
        raise DataError(
            f"{folder} is missing; set {key}.root and {key}.folder to the folder that holds the set's class folders "
            f"(folder: . if root itself does)"
        )
    left_out = _nothing_left_out()
    paths = _list_part(root, part, left_out)
    for name in paths:
        if name not in classes:
            raise DataError(
                f"{printable(folder / name)} is a class that the training data lack{nearest(name, classes)}; remove or "
                f"rename the folder"
            )
    images = _image_folder(root, paths, classes, reading)
    return images, _notes(left_out)


def _nothing_left_out() -> dict[str, list[str]]:
    return {OTHER_TYPE: [], NO_CLASS: [], LINK_UPWARDS: []}


def _notes(left_out: dict[str, list[str]]) -> str:
    return "; ".join(
        _note(reason, files) for reason, files in left_out.items() if files
    )


def _check_below_root(key: str, name: str) -> None:
    """Raise `ConfigError` for the name of a folder that leads out of `data.root`."""
    if not name.strip() or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ConfigError(f"data.{key}", f'"{name}" is no folder below data.root')


def check_root(root: Path, holds: str) -> None:
    """Raise `DataError` unless `data.root` is a folder."""
    if not root.is_dir():
        raise DataError(
            f"data.root={root} is not a folder; set it to the one that holds {holds}"
        )


def _image_folder(
    root: Path,
    paths_by_class: dict[str, list[str]],
    classes: list[str],
    reading: ImageReading | None,
) -> ImageFolder:
    paths: list[str] = []
    targets: list[int] = []
    for target, name in enumerate(classes):
        in_class = paths_by_class.get(name, [])
        paths += in_class
        targets += [target] * len(in_class)
    return ImageFolder(root, paths, targets, reading)


def _list_part(
    root: Path, part: str, left_out: dict[str, list[str]]
) -> dict[str, list[str]]:
    """The sorted image paths of each class folder of `root/part`, classes sorted; other files go to `left_out`."""
    folder = root / part
    if not folder.is_dir():
        raise DataError(
            f"{folder} is missing; data.root must hold a folder with class folders for each part, train/ and val/ by "
            f"default (data.train_folder, data.val_folder; or data.val_fraction for one folder alone)"
        )
    paths_by_class: dict[str, list[str]] = {}
    for entry in sorted(folder.iterdir(), key=_sort_key):
        if entry.name.startswith("."):
            continue
        check_utf8(str(entry))
        if not entry.is_dir():
            left_out[NO_CLASS].append(f"{part}/{entry.name}")
            continue
        if leads_upwards(entry, root):
            left_out[LINK_UPWARDS].append(f"{part}/{entry.name}")
            continue
        name = normal_form(entry.name)
        if name in paths_by_class:
            raise DataError(
                f"{folder} has two folders named {name}, spelt in two ways in Unicode; put their images into one"
            )
        paths_by_class[name] = []
        files = _files(root, entry, left_out[LINK_UPWARDS])
        for path in sorted(files, key=sort_key):
            check_utf8(path)
            group = paths_by_class[name] if _is_image(path) else left_out[OTHER_TYPE]
            group.append(path)
    if not paths_by_class:
        raise DataError(
            f"{folder} has no class folders; put each class's images in a folder named after it"
        )
    if not any(paths_by_class.values()):
        raise DataError(f"{folder} holds no {_types()} in its class folders; add some")
    return paths_by_class


def _sort_key(path: Path) -> str:
    return normal_form(path.name)


def image_files(folder: Path) -> list[Path]:
    """The image files under `folder`, sorted by path."""
    paths = sorted(_files(folder, folder, []), key=sort_key)
    return [folder / path for path in paths if _is_image(path)]


def _files(root: Path, folder: Path, links_upwards: list[str]) -> Iterator[str]:
    """Every file under `folder` that is not hidden, relative to `root`.

    Links are followed, but for those that lead back to a folder above: they go to `links_upwards`.
    """
    for parent, folders, names in os.walk(
        folder, onerror=_raise_unreadable, followlinks=True
    ):
        relative = Path(parent).relative_to(root)
        # os.walk goes into what is left in `folders`.
        for name in list(folders):
            is_loop = leads_upwards(Path(parent, name), root)
            if is_loop:
                links_upwards.append((relative / name).as_posix())
            if is_loop or name.startswith("."):
                folders.remove(name)
        for name in names:
            if not name.startswith("."):
                yield (relative / name).as_posix()


def leads_upwards(path: Path, root: Path) -> bool:
    """True for a link to a folder that holds it, by its own place or by the links on the way from `root`."""
    if not path.is_symlink():
        return False
    target = path.resolve()
    if path.parent.resolve().is_relative_to(target):
        return True
    for folder in path.parents:
        if folder.resolve() == target:
            return True
        if folder == root:
            break
    return False


def _is_image(path: str) -> bool:
    return path.lower().endswith(IMAGE_TYPES)


def _raise_unreadable(error: OSError) -> None:
    remedy = "" if may_pass(error) else "; permit it or remove the folder"
    raise data_error(
        f"{printable(error.filename)} cannot be read: {error.strerror}{remedy}", error
    )


def _types() -> str:
    return f"{', '.join(IMAGE_TYPES[:-1])} or {IMAGE_TYPES[-1]} files"


def _note(reason: str, files: list[str]) -> str:
    """How many files were left out and why, the first three by name."""
    more = ", …" if len(files) > 3 else ""
    noun = "files" if len(files) > 1 else "file"
    names = ", ".join(map(printable, files[:3]))
    return f"{len(files)} {noun} left out: {reason} ({names}{more})"
