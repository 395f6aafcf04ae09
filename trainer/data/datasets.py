"""Data sets by name: digits, folder, cifar10, mnist, fake, shapes, or an import path to a map-style data set.

A sample's id is its position in the set. What a set holds depends on its own arguments and files. It never depends on
`run.seed`, on the number of processes, or on the order in which a file system lists its files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from trainer.config.data_section import DataConfig
from trainer.config.evaluation_sets import validation_sets
from trainer.config.registry import build, resolve
from trainer.data.folder import image_folders
from trainer.data.image_reading import ImageReading
from trainer.data.imported import imported_parts, names_of_parameters
from trainer.data.labelled_images import labelled_images
from trainer.data.parts import check_part, shared_class_names
from trainer.data.rows import as_pairs
from trainer.data.shapes import Shapes, check_target
from trainer.data.shapes import class_names as class_names_of_shapes
from trainer.data.transform_sizes import check_image_sizes
from trainer.errors import ConfigError, DataError, UnreadableError, may_pass
from trainer.exact.seeding import numpy_generator

SMALLEST_SHAPES = 32  # pixels of a side
LARGEST_VARIATION = 0.5  # of a side's length


class MapDataset(Protocol):
    """Samples by id: an image (or anything that the transforms and the model take) and its target."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Any, Any]: ...


@dataclass(frozen=True)
class Datasets:
    """What a run trains on and is evaluated on. `val` is None only if an import path names a set without one.

    Where there are named validation sets, `named` holds all of them, and `val` is the first.
    """

    train: MapDataset
    val: MapDataset | None
    classes: list[str] | None  # names, by class id; None for regression or if unknown
    name: str
    note: str = ""  # what the user should know about it, such as files left out
    named: Mapping[str, MapDataset] = field(default_factory=dict)
    test: MapDataset | None = None
    images: str = (
        ""  # what is done to image files once they are decoded, and where they are kept
    )

    def validation(self) -> dict[str, MapDataset]:
        """The validation sets, by the first part of their metrics' names: `val`, or `val/<name>` of named ones."""
        if self.named:
            return {f"val/{name}": part for name, part in self.named.items()}
        return {} if self.val is None else {"val": self.val}

    def evaluated(self) -> dict[str, MapDataset]:
        """The same, and `test` if there is such a set."""
        test = {} if self.test is None else {"test": self.test}
        return self.validation() | test


@dataclass(frozen=True)
class ImageArrays:
    """A set in memory: `images` uint8 `(N, C, H, W)`, `targets` int64 `(N,)`."""

    images: torch.Tensor
    targets: torch.Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], int(self.targets[index])

    def batch(self, ids: list[int] | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images `(n, C, H, W)` and targets `(n,)` of several samples at once."""
        index = torch.as_tensor(ids, dtype=torch.int64)
        images = self.images.index_select(0, index)
        targets = self.targets.index_select(0, index)
        return images, targets


@dataclass(frozen=True)
class FakeImages:
    """Noise on a 4×4 pattern of the sample's class, which is `index % num_classes`. No image is stored."""

    part: str
    size: int
    shape: tuple[int, int, int]  # channels, height, width
    num_classes: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if not 0 <= index < self.size:
            raise IndexError(f"sample {index} of {self.size}")
        channels, height, width = self.shape
        target = index % self.num_classes
        # The same pattern in both parts, so that what is learned can be validated; noise of each sample's own.
        of_class = numpy_generator(0, "fake/class", target)
        of_sample = numpy_generator(0, f"fake/{self.part}", index)
        pattern = of_class.integers(256, size=(channels, 4, 4), dtype=np.uint8)
        noise = of_sample.integers(256, size=self.shape, dtype=np.uint8)
        rows = np.arange(height) * 4 // height
        columns = np.arange(width) * 4 // width
        enlarged = pattern[:, rows][:, :, columns]
        # Halves first: bytes have no room for a sum of two levels.
        pixels = noise // 2 + enlarged // 2
        return torch.from_numpy(pixels), target


def build_datasets(
    section: DataConfig, device_main_first: Callable[[], AbstractContextManager[None]]
) -> Datasets:
    """The data set that `section` names, from its own arguments `section.args`.

    A download (`data.download=true`) runs within `device_main_first()`, which lets one process go ahead.
    Raises `ConfigError` for a wrong name or argument, `DataError` for files that are missing or of no use.
    """
    check_image_sizes(section)
    target = resolve("data", section.name, MAKERS)
    parameters = names_of_parameters(target)
    _check_section(section, parameters)
    # Without a download nothing is written, so all processes read at once.
    with device_main_first() if section.args.get("download") else nullcontext():
        if section.name not in MAKERS:
            return _imported(section, target, parameters)
        data: Datasets = build(
            "data",
            target,
            section.args,
            root=section.root,
            cache=0.0 if section.cache == "decoded" else section.cache,
            reading=ImageReading.of(section),
            needs_val=section.val_fraction is None and needs_own_part(section),
            is_split=section.val_fraction is not None,
        )
        return data


def needs_own_part(section: DataConfig) -> bool:
    """True unless all validation sets that `section` names are others than its data set's own part."""
    sets = validation_sets(section.val)
    return not sets or any(item.is_plain for item in sets.values())


def _check_section(section: DataConfig, parameters: set[str]) -> None:
    """Raise a `ConfigError` for a key that the data set does not take, or a `root` that it lacks."""
    if section.root is not None and not {"root", "**"} & parameters:
        raise ConfigError("data.root", f"{section.name} takes no root; leave it out")
    if section.cache and section.name != "folder":
        raise ConfigError(
            "data.cache",
            f"keeps the images of data.name=folder, not of {section.name}; leave it out",
        )
    if section.short_side not in ("auto", "full") and section.name != "folder":
        raise ConfigError(
            "data.short_side",
            f"is for the images of data.name=folder, not for {section.name}; leave it out",
        )
    if section.root is None and section.name in MAKERS and "root" in parameters:
        raise ConfigError(
            "data.root",
            f"is not set; {section.name} needs the folder that holds its files",
        )


def digits() -> Datasets:
    """scikit-learn's handwritten digits, uint8 `(1, 8, 8)`: 1439 to train, 358 to validate, stratified."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    pixels = (bunch.images * (255 / 16)).round().astype(np.uint8)  # 17 grey levels
    images = torch.from_numpy(pixels).unsqueeze(1)
    targets = torch.from_numpy(bunch.target).long()
    train, val = train_test_split(
        np.arange(len(targets)), test_size=358, stratify=bunch.target, random_state=0
    )
    classes = [str(name) for name in bunch.target_names]
    return Datasets(
        ImageArrays(images[train], targets[train]),
        ImageArrays(images[val], targets[val]),
        classes,
        "digits",
    )


def folder(
    root: str,
    cache: float = 0.0,
    reading: ImageReading | None = None,
    *,
    needs_val: bool = True,
    is_split: bool = False,
    train_folder: str | None = None,
    val_folder: str = "val",
    labels: str | dict[str, Any] | None = None,
) -> Datasets:
    """Images in class folders, `root/train/<class>/…` and `root/val/<class>/…`, or those that a label file names.

    Args:
        cache: up to so many GiB of images are decoded at once and kept in memory, those to train from first.
        reading: how an image is made of a file.
        needs_val: whether validation images are looked for.
        is_split: whether validation images are taken out of the training images.
        train_folder: folder below root with the class folders to train on; null = train, or with data.val_fraction
            root itself where it holds no train/.
        val_folder: the same for validation.
        labels: a CSV file with the columns path, label and split, or {file: a.csv, label: breed, kind: classes, …}.
    """
    directory = Path(root).expanduser()
    names: list[str] | None
    if labels is None:
        if train_folder is None:
            train_folder = _default_train_folder(directory, is_split=is_split)
        folders = train_folder, val_folder
        train, val, names, note = image_folders(
            directory, reading, folders=folders, needs_val=needs_val
        )
    else:
        _refuse_folders(train_folder, val_folder)
        train, val, names, note = labelled_images(
            directory, labels, reading, needs_val=needs_val
        )
    bytes_left = train.cache_first(round(cache * 2**30))
    if val is not None:
        val.cache_first(bytes_left)
    return Datasets(train, val, names, "folder", note)


def _default_train_folder(directory: Path, *, is_split: bool) -> str:
    holds_classes = directory.is_dir() and not (directory / "train").is_dir()
    return "." if is_split and holds_classes else "train"


def _refuse_folders(train_folder: str | None, val_folder: str) -> None:
    """Raise `ConfigError` for the name of a folder beside a label file."""
    if train_folder is not None or val_folder != "val":
        key = "val_folder" if train_folder is None else "train_folder"
        raise ConfigError(
            f"data.{key}", "says nothing beside data.labels, which names each image"
        )


def cifar10(root: str, download: bool = False) -> Datasets:
    """CIFAR-10 (Krizhevsky, 2009), uint8 `(3, 32, 32)`: 50000 to train, 10000 to validate."""
    from torchvision.datasets import CIFAR10

    files = f"{CIFAR10.url} and unpack it in {root}"
    train, val = _torchvision("cifar10", CIFAR10, root, download, files)
    return Datasets(_in_memory(train), _in_memory(val), train.classes, "cifar10")


def mnist(root: str, download: bool = False) -> Datasets:
    """MNIST (LeCun et al., 1998), uint8 `(1, 28, 28)`: 60000 to train, 10000 to validate."""
    from torchvision.datasets import MNIST

    names = ", ".join(name for name, _ in MNIST.resources)
    folder = Path(root, "MNIST", "raw")
    files = f"{names} from {MNIST.mirrors[0]} and unpack them in {folder}"
    train, val = _torchvision("mnist", MNIST, root, download, files)
    return Datasets(_in_memory(train), _in_memory(val), list("0123456789"), "mnist")


def fake(
    size: int = 1000,
    val_size: int = 200,
    image_size: int | list[int] = 32,
    channels: int = 3,
    num_classes: int = 10,
) -> Datasets:
    """Made-up images that a small net can learn, each a function of its id and part: see `FakeImages`."""
    sides = image_size if isinstance(image_size, list) else [image_size, image_size]
    if len(sides) != 2:
        raise ConfigError(
            "data.image_size",
            f"{image_size} is neither a whole number nor [height, width]",
        )
    _check_positive(
        size=size, val_size=val_size, channels=channels, num_classes=num_classes
    )
    for side in sides:
        _check_positive(image_size=side)
    shape = (channels, sides[0], sides[1])
    train = FakeImages("train", size, shape, num_classes)
    val = FakeImages("val", val_size, shape, num_classes)
    return Datasets(train, val, [str(name) for name in range(num_classes)], "fake")


def shapes(
    size: int = 400,
    val_size: int = 100,
    image_size: int = 64,
    target: str = "mask",
    vary: float = 0.0,
) -> Datasets:
    """Made-up images of squares, discs and crosses, for detection, segmentation, labels or regression: see `Shapes`."""
    check_target(target)
    _check_positive(size=size, val_size=val_size, image_size=image_size)
    if image_size < SMALLEST_SHAPES:
        raise ConfigError(
            "data.image_size", f"{image_size} is less than {SMALLEST_SHAPES}"
        )
    if not 0 <= vary <= LARGEST_VARIATION:
        raise ConfigError("data.vary", f"{vary} is not from 0 to {LARGEST_VARIATION}")
    train = Shapes("train", size, image_size, target, vary)
    val = Shapes("val", val_size, image_size, target, vary)
    return Datasets(train, val, class_names_of_shapes(target), "shapes")


MAKERS: dict[str, Callable[..., Datasets]] = {
    "digits": digits,
    "folder": folder,
    "cifar10": cifar10,
    "mnist": mnist,
    "fake": fake,
    "shapes": shapes,
}


def _check_positive(**arguments: Any) -> None:
    for name, value in arguments.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(
                f"data.{name}", f"{value} is not a whole number of at least 1"
            )


def _torchvision(
    name: str, cls: Any, root: str, download: bool, files: str
) -> tuple[Any, Any]:
    """Both parts of a torchvision set, or a `DataError` that says which `files` to put where."""
    if not isinstance(download, bool):
        raise ConfigError("data.download", f"{download} is neither true nor false")
    try:
        return cls(root, train=True, download=download), cls(
            root, train=False, download=download
        )
    except (RuntimeError, OSError, ValueError, AssertionError) as error:
        # What torchvision raises for damaged files.
        if download:
            message = (
                f"{name} cannot be downloaded to {root} ({error}); download {files}"
            )
            # An `OSError` is the network's or the disk's.
            if isinstance(error, OSError):
                raise UnreadableError(message) from error
            raise DataError(message) from error
        if may_pass(error):
            message = f"{name} cannot be read in data.root={root} ({error})"
            raise UnreadableError(message) from error
        raise DataError(
            f"{name} is missing or damaged in data.root={root}: set data.download=true, or download {files}"
        ) from None


def _in_memory(part: Any) -> ImageArrays:
    """A torchvision set, whose `data` is `(N, H, W)` or `(N, H, W, 3)`, as `(N, C, H, W)`."""
    data = torch.as_tensor(part.data)
    images = data.unsqueeze(1) if data.ndim == 3 else data.permute(0, 3, 1, 2)
    return ImageArrays(images, torch.as_tensor(part.targets))


def _imported(
    section: DataConfig, target: Callable[..., Any], parameters: set[str]
) -> Datasets:
    """The data set of an import path, and its class names if it has a list `classes`."""
    train, val = imported_parts(section, target, parameters)
    check_part(section.name, "training", train)
    if val is not None:
        check_part(section.name, "validation", val)
    train = as_pairs(train, section.columns)
    val = as_pairs(val, section.columns)
    return Datasets(train, val, shared_class_names(train, val), section.name)
