"""Images in class folders, `root/train/<class>/…` and `root/val/<class>/…`, decoded one by one when read."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from trainer.errors import DataError, nearest

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp")
AHEAD = 64  # images decoded before they are known to fit
OTHER_TYPE, NO_CLASS = "not an image type that is read", "not in a class folder"  # why files are left out


class ImageFolder:
    """The images of one part. Sample `i` is the i-th path, sorted by class, then by path.

    `paths` are relative to `root`, with forward slashes; `targets` are the class ids beside them.
    """

    def __init__(self, root: Path, paths: list[str], targets: list[int]) -> None:
        self.root = root
        self.paths = paths
        self.targets = targets
        self._held: list[torch.Tensor] = []  # the first images, decoded

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """The image, uint8 `(3, H, W)`, turned upright by its EXIF data, and its class id.

        Raises `DataError` where the file cannot be decoded: a sample is never replaced by another.
        """
        if 0 <= index < len(self._held):
            return self._held[index].clone(), self.targets[index]  # a transform may write into what it is given
        return decode(self.root / self.paths[index]), self.targets[index]

    def hold(self, room: int) -> int:
        """Decode the first images, as many as fit into `room` bytes, and keep them; the room that is left.

        Loader processes that are forked share them.
        """
        with ThreadPoolExecutor() as threads:  # decoding leaves the interpreter to others
            for start in range(0, len(self) if room else 0, AHEAD):
                for image in threads.map(lambda path: decode(self.root / path), self.paths[start : start + AHEAD]):
                    if image.nbytes > room:
                        return 0
                    room -= image.nbytes
                    self._held.append(image)
        return room


def image_folders(root: Path) -> tuple[ImageFolder, ImageFolder, list[str], str]:
    """Training and validation images, class names (train/'s folders, sorted), a note on files left out."""
    if not root.is_dir():
        raise DataError(f"data.root={root} is not a folder; set it to the one that holds train/ and val/")
    left_out: dict[str, list[str]] = {OTHER_TYPE: [], NO_CLASS: []}
    train = _by_class(root, "train", left_out)
    for name, images in train.items():
        if not images:
            raise DataError(f"{root / 'train' / name} holds no {_types()}; add images or remove the folder")
    val = _by_class(root, "val", left_out)
    for name in val:
        if name not in train:
            raise DataError(
                f"{root / 'val' / name} is a class that train/ lacks{nearest(name, train)}; "
                f"add {root / 'train' / name} or remove the folder"
            )
    classes = list(train)
    note = "; ".join(_note(reason, files) for reason, files in left_out.items() if files)
    return _part(root, train, classes), _part(root, val, classes), classes, note


def _part(root: Path, images: dict[str, list[str]], classes: list[str]) -> ImageFolder:
    paths = [path for name in classes for path in images.get(name, [])]
    targets = [target for target, name in enumerate(classes) for _ in images.get(name, [])]
    return ImageFolder(root, paths, targets)


def _by_class(root: Path, part: str, left_out: dict[str, list[str]]) -> dict[str, list[str]]:
    """The sorted paths of each class folder of `root/part`, classes sorted; other files go to `left_out`."""
    folder = root / part
    if not folder.is_dir():
        raise DataError(f"{folder} is missing; data.root must hold train/ and val/, each with class folders")
    images: dict[str, list[str]] = {}
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if not entry.is_dir():
            left_out[NO_CLASS].append(f"{part}/{entry.name}")
            continue
        files = sorted(_files(root, entry))
        images[entry.name] = [path for path in files if path.lower().endswith(IMAGE_TYPES)]
        left_out[OTHER_TYPE] += [path for path in files if not path.lower().endswith(IMAGE_TYPES)]
    if not images:
        raise DataError(f"{folder} has no class folders; put each class's images in a folder named after it")
    if not any(images.values()):
        raise DataError(f"{folder} holds no {_types()} in its class folders; add some")
    return images


def _files(root: Path, folder: Path) -> Iterator[str]:
    """Every file under `folder` that is not hidden, relative to `root`; links are followed."""
    for parent, folders, names in os.walk(folder, onerror=_unreadable, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        within = Path(parent).relative_to(root)
        yield from ((within / name).as_posix() for name in names if not name.startswith("."))


def image_files(folder: Path) -> list[Path]:
    """The image files under `folder`, sorted by path."""
    return [folder / path for path in sorted(_files(folder, folder)) if path.lower().endswith(IMAGE_TYPES)]


def _unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read: {error.strerror}; permit it or remove the folder")


def _types() -> str:
    return f"{', '.join(IMAGE_TYPES[:-1])} or {IMAGE_TYPES[-1]} files"


def _note(reason: str, files: list[str]) -> str:
    """Say how many files were left out and why, the first three by name."""
    names = ", ".join(files[:3]) + (", …" if len(files) > 3 else "")
    return f"{len(files)} file{'s' if len(files) > 1 else ''} left out: {reason} ({names})"


def decode(path: Path, channels: int = 3) -> torch.Tensor:
    """The image file, uint8 `(channels, H, W)`, in colour (3) or grey (1), turned upright by its EXIF data."""
    from torchvision.io import ImageReadMode, decode_image, read_file
    from torchvision.transforms.v2.functional import to_dtype

    mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
    try:
        image = decode_image(read_file(str(path)), mode=mode, apply_exif_orientation=True)
    except RuntimeError as error:
        reason = re.sub(r"^.*\.cpp:\d+, ", "", str(error).splitlines()[0])  # not where torchvision noticed it
        raise DataError(f"{path} cannot be decoded ({reason}); remove or replace the file") from None
    if image.ndim != 3:
        raise DataError(f"{path} is an animation of {len(image)} images, not one; remove or replace the file")
    decoded: torch.Tensor = to_dtype(image, torch.uint8, scale=True)  # a 16-bit PNG is read as uint16
    return decoded
