"""Data sets by name: exact splits, folders of images, torchvision's files, made-up images, import paths."""

from __future__ import annotations

import hashlib
import os
import pickle
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision.datasets import CIFAR10, MNIST

from trainer.config.data_section import DataConfig
from trainer.data.datasets import Datasets, ImageArrays, build_datasets
from trainer.data.decoding import decode
from trainer.errors import ConfigError, DataError

# A deprecated decoder would be called.
pytestmark = pytest.mark.filterwarnings(
    "error:The image decoding and encoding:DeprecationWarning"
)


class MainFirst:
    """Counts the entries of the context that lets one process go first."""

    def __init__(self) -> None:
        self.entered = 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self.entered += 1
        yield


def make(
    name: str, root: Any = None, main_first: MainFirst | None = None, **args: Any
) -> Datasets:
    section = DataConfig(name=name, root=None if root is None else str(root), args=args)
    return build_datasets(section, main_first or MainFirst())


def error_text(error: type[Exception], name: str, root: Any = None, **args: Any) -> str:
    with pytest.raises(error) as caught:
        make(name, root, **args)
    return str(caught.value)


# --- digits


def test_digits_is_scikit_learns_stratified_split() -> None:
    images, labels = load_digits(return_X_y=True)
    expected = train_test_split(
        images, labels, test_size=358, stratify=labels, random_state=0
    )
    data = make("digits")
    assert (len(data.train), len(data.val)) == (1439, 358)
    assert data.classes == [str(digit) for digit in range(10)]
    for part, pixels, targets in zip(
        (data.train, data.val), expected[:2], expected[2:], strict=True
    ):
        assert part.images.dtype == torch.uint8 and part.images.shape == (
            len(targets),
            1,
            8,
            8,
        )
        assert (
            part.targets.dtype == torch.int64
            and part.targets.tolist() == targets.tolist()
        )
        difference = (
            part.images.flatten(1).double() - torch.from_numpy(pixels) * 255 / 16
        )
        assert difference.abs().max() <= 0.5  # the nearest of 256 levels
    assert int(data.train.images.max()) == 255


def test_digits_parts_are_disjoint_complete_and_stratified() -> None:
    data = make("digits")
    whole = torch.from_numpy(load_digits().data * (255 / 16)).round().to(torch.uint8)
    both = torch.cat([data.train.images, data.val.images]).flatten(1)
    assert sorted(both.tolist()) == sorted(whole.tolist())
    shares = [
        part.targets.bincount(minlength=10) / len(part)
        for part in (data.train, data.val)
    ]
    assert (shares[0] - shares[1]).abs().max() < 1 / 358


def test_digits_does_not_depend_on_random_state_nor_change_it() -> None:
    first = make("digits")
    np.random.seed(5)
    torch.manual_seed(5)
    states = np.random.get_state()[1].tolist(), torch.get_rng_state()
    second = make("digits")
    assert torch.equal(first.train.images, second.train.images)
    assert np.random.get_state()[1].tolist() == states[0] and torch.equal(
        torch.get_rng_state(), states[1]
    )


def test_arrays_give_a_batch_as_they_give_its_samples() -> None:
    data = ImageArrays(
        torch.arange(5 * 12, dtype=torch.uint8).view(5, 3, 2, 2), torch.arange(5) * 10
    )
    for ids in ([3, 0, 3], torch.tensor([3, 0, 3])):
        images, targets = data.batch(ids)
        assert torch.equal(images, torch.stack([data[i][0] for i in (3, 0, 3)]))
        assert targets.tolist() == [data[i][1] for i in (3, 0, 3)] == [30, 0, 30]
    assert type(data[1][1]) is int
    assert list(data)[4][1] == 40  # ends, by IndexError


# --- folder


def picture(
    path: Path, size: tuple[int, int] = (6, 4), mode: str = "RGB", **options: Any
) -> Path:
    """A noise image, the same for the same name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(path.name)).integers(
        0, 256, (size[1], size[0], 4), dtype=np.uint8
    )
    Image.fromarray(noise).convert(mode).save(path, **options)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in (
        "train/bees/b.png",
        "train/ants/10.JPG",
        "train/ants/9.jpeg",
        "train/ants/sub/a.webp",
    ):
        picture(tmp_path / name)
    picture(tmp_path / "val/bees/x.png")
    return tmp_path


def test_folder_sorts_by_class_then_path_whatever_the_file_system_says(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [
        "train/ants/10.JPG",
        "train/ants/9.jpeg",
        "train/ants/sub/a.webp",
        "train/bees/b.png",
    ]
    scandir, listdir = os.scandir, os.listdir

    class Reversed:
        def __init__(self, path: Any) -> None:
            self.entries = iter(
                sorted(scandir(path), key=lambda entry: entry.name, reverse=True)
            )

        def __enter__(self) -> Reversed:
            return self

        def __exit__(self, *_: object) -> None: ...

        def __iter__(self) -> Iterator[os.DirEntry[str]]:
            return self.entries

        def __next__(self) -> os.DirEntry[str]:
            return next(self.entries)

    for scan, names in (
        (scandir, os.listdir),
        (Reversed, lambda path: sorted(listdir(path), reverse=True)),
    ):
        monkeypatch.setattr(os, "scandir", scan)
        monkeypatch.setattr(os, "listdir", names)
        data = make("folder", root)
        assert data.train.paths == expected
        assert data.train.targets == [0, 0, 0, 1]
    assert data.classes == ["ants", "bees"]
    # Its class id is train's.
    assert (data.val.paths, data.val.targets) == (["val/bees/x.png"], [1])
    assert (data.name, data.note) == ("folder", "")
    assert [target for _, target in data.train] == data.train.targets


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1"])
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_png_is_decoded_exactly_as_pil_does(root: Path, mode: str) -> None:
    path = picture(root / "train/ants/0.png", (7, 5), mode)
    image, target = make("folder", root).train[0]
    assert image.dtype == torch.uint8 and image.shape == (3, 5, 7) and target == 0
    assert np.array_equal(
        image.permute(1, 2, 0).numpy(), np.asarray(Image.open(path).convert("RGB"))
    )


def test_jpeg_and_webp_are_decoded_nearly_as_pil_does_and_upright(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: the camera was turned by 90 degrees
    picture(root / "train/ants/10.JPG", (40, 24), exif=exif, quality=95)
    picture(root / "train/ants/sub/a.webp", (40, 24))
    data = make("folder", root).train
    turned = np.asarray(
        Image.open(root / "train/ants/10.JPG").transpose(Image.Transpose.ROTATE_270)
    )
    assert data[0][0].shape == (3, 40, 24)
    assert np.abs(data[0][0].permute(1, 2, 0).numpy() - turned.astype(int)).max() <= 2
    straight = np.asarray(
        Image.open(root / "train/ants/sub/a.webp").convert("RGB")
    ).astype(int)
    assert np.abs(data[2][0].permute(1, 2, 0).numpy() - straight).max() <= 2


def test_a_16_bit_png_is_scaled_to_8_bits(root: Path) -> None:
    levels = np.array([[0, 255, 256], [32768, 65280, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(root / "train/ants/0.png")
    image, _ = make("folder", root).train[0]
    assert image.dtype == torch.uint8
    assert image[0].tolist() == [[0, 0, 1], [128, 255, 255]]


def test_files_left_out_are_noted_and_hidden_ones_ignored(root: Path) -> None:
    (root / "train/ants/imageNotFound.gif").write_bytes(b"GIF89a")
    assert make("folder", root).note == (
        "1 file left out: not an image type that is read (train/ants/imageNotFound.gif)"
    )
    for name in (
        "train/.DS_Store",
        "train/ants/.DS_Store",
        "train/ants/.git/x.png",
        "val/.cache/y.png",
    ):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    for name in (
        "train/ants/a.txt",
        "train/bees/sub/b.svg",
        "val/bees/c.heic",
        "val/d.png",
        "ignored.png",
    ):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    data = make("folder", root)
    assert data.note == (
        "4 files left out: not an image type that is read "
        "(train/ants/a.txt, train/ants/imageNotFound.gif, train/bees/sub/b.svg, …); "
        "1 file left out: not in a class folder (val/d.png)"
    )
    assert (len(data.train), len(data.val), data.classes) == (4, 1, ["ants", "bees"])


def test_kept_images_are_the_decoded_ones_and_as_many_as_fit(root: Path) -> None:
    plain = make("folder", root)
    parts = [plain.train, plain.val]
    total = sum(part[i][0].nbytes for part in parts for i in range(len(part)))
    for room, all_fit in ((total, True), (total - 1, False)):
        data = build_datasets(
            DataConfig(name="folder", root=str(root), cache=room / 2**30), MainFirst()
        )
        for cached, part in zip((data.train, data.val), parts, strict=True):
            for i in range(len(part)):
                cached[i][0].zero_()  # what a transform writes into stays its own
                assert torch.equal(cached[i][0], part[i][0])
                assert cached[i][1] == part[i][1]
        cached_count = len(data.train._cached) + len(data.val._cached)
        count = len(plain.train) + len(plain.val)
        assert cached_count == count if all_fit else 0 < cached_count < count
    with pytest.raises(
        ConfigError,
        match=r"data.cache: keeps the images of data.name=folder, not of digits",
    ):
        build_datasets(DataConfig(name="digits", cache=1.0), MainFirst())


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "gone", "animation"])
def test_a_corrupt_image_is_an_error_that_names_it_and_never_its_neighbour(
    root: Path, damage: str
) -> None:
    path = picture(root / "train/ants/9.jpeg", (64, 64))
    data = make("folder", root).train
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    elif damage == "animation":
        frames = [Image.new("L", (4, 4), level) for level in (0, 255)]
        frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"<html>not an image</html>" if damage == "text" else b"")
    with pytest.raises(DataError) as caught:
        data[1]
    message = str(caught.value)
    assert str(path) in message and message.endswith("remove or replace the file")
    assert ".cpp" not in message and "\n" not in message
    assert data[0][1] == data[2][1] == 0


def test_folder_errors_name_what_is_wrong(root: Path) -> None:
    assert error_text(ConfigError, "folder").startswith("data.root: is not set")
    assert "data.root=nowhere is not a folder" in error_text(
        DataError, "folder", "nowhere"
    )
    assert f"{root / 'train/bees/train'} is missing" in error_text(
        DataError, "folder", root / "train/bees"
    )

    (root / "train/wasps").mkdir()
    assert (
        f"{root / 'train/wasps'} holds no .jpg, .jpeg, .png, .webp, .bmp, .tif, .tiff or .avif"
        in error_text(DataError, "folder", root)
    )
    (root / "train/wasps").rmdir()

    picture(root / "val/bee/y.png")
    message = error_text(DataError, "folder", root)
    assert (
        f"{root / 'val/bee'} is a class that train/ lacks" in message
        and 'did you mean "bees"?' in message
    )
    (root / "val/bee/y.png").rename(root / "val/bees/y.png")
    (root / "val/bee").rmdir()

    assert "data.rooot: folder has no such argument" in error_text(
        ConfigError, "folder", root, rooot=3
    )

    for name in ("x.png", "y.png"):
        (root / "val/bees" / name).rename(root / name)
    assert f"{root / 'val'} holds no .jpg" in error_text(DataError, "folder", root)
    (root / "val/bees").rmdir()
    assert f"{root / 'val'} has no class folders" in error_text(
        DataError, "folder", root
    )
    (root / "val").rmdir()
    assert f"{root / 'val'} is missing" in error_text(DataError, "folder", root)


@pytest.mark.parametrize(
    ("name", "mode", "tolerance"),
    [
        ("0.bmp", "RGB", 0),
        ("0.bmp", "L", 0),
        ("0.bmp", "1", 0),
        ("0.TIF", "RGB", 0),
        ("0.tiff", "RGBA", 0),
        ("0.tiff", "CMYK", 0),
        ("0.tiff", "P", 0),
        ("0.avif", "RGB", 0),
        # A name says less than the file.
        ("0.jpg", "BMP", 0),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_kinds_that_torchvision_does_not_read_are_decoded_as_pil_does(
    tmp_path: Path, name: str, mode: str, tolerance: int, channels: int
) -> None:
    options = {"format": "BMP"} if mode == "BMP" else {}
    path = picture(tmp_path / name, (7, 5), "RGB" if mode == "BMP" else mode, **options)
    image = decode(path, channels)
    assert image.dtype == torch.uint8 and image.shape == (channels, 5, 7)
    with Image.open(path) as opened:
        expected = np.asarray(opened.convert("L" if channels == 1 else "RGB"))
    pixels = image[0] if channels == 1 else image.permute(1, 2, 0)
    assert np.array_equal(pixels.numpy(), expected)


@pytest.mark.parametrize("ending", ["webp", "jpg", "png", "tiff", "avif"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 6, 8])
def test_every_kind_is_turned_upright(
    tmp_path: Path, ending: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    ramp = np.zeros((24, 40, 3), dtype=np.uint8)
    ramp[..., 0] = np.arange(40) * 6
    ramp[..., 1] = np.arange(24).reshape(24, 1) * 10
    image = Image.fromarray(ramp)
    image.save(tmp_path / f"a.{ending}", exif=exif, quality=95)
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        6: Image.Transpose.ROTATE_270,
        8: Image.Transpose.ROTATE_90,
    }
    upright = image.transpose(turns[orientation]) if orientation > 1 else image
    expected = np.asarray(upright).astype(int)
    pixels = decode(tmp_path / f"a.{ending}").permute(1, 2, 0).numpy()
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected).mean() < 4  # some kinds are lossy


def test_grey_levels_of_16_bits_are_scaled_and_others_refused(tmp_path: Path) -> None:
    levels = np.array([[0, 255, 256], [32768, 65280, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.tiff")
    assert decode(tmp_path / "a.tiff")[2].tolist() == [[0, 0, 1], [128, 255, 255]]
    Image.fromarray(levels.astype(np.float32)).save(tmp_path / "b.tiff")
    with pytest.raises(DataError, match="Pillow's mode F, whose range"):
        decode(tmp_path / "b.tiff")


@pytest.mark.parametrize("ending", ["bmp", "tiff", "avif", "webp"])
def test_a_damaged_file_or_an_animation_of_any_kind_is_named(
    tmp_path: Path, ending: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = picture(tmp_path / f"a.{ending}", (64, 64), exif=exif)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(DataError) as caught:
        decode(path)
    message = str(caught.value)
    assert str(path) in message and message.endswith("remove or replace the file")
    assert "\n" not in message and "BytesIO" not in message
    if ending != "bmp":
        frames = [Image.new("L", (8, 8), level) for level in (0, 255)]
        frames[0].save(path, save_all=True, append_images=frames[1:])
        with pytest.raises(DataError, match=r"animation of 2 images|Animated webp"):
            decode(path)


def test_a_link_back_to_a_folder_above_is_left_out(root: Path) -> None:
    paths = make("folder", root).train.paths
    (root / "train/ants/self").symlink_to(root / "train/ants")
    (root / "train/ants/sub/up").symlink_to("../..")
    (root / "train/ants/root").symlink_to(root)
    (root / "train/wasps").symlink_to("..")
    # Each leads into the other.
    (root / "train/bees/one").mkdir()
    (root / "train/bees/two").mkdir()
    (root / "train/bees/one/x").symlink_to(root / "train/bees/two")
    (root / "train/bees/two/y").symlink_to(root / "train/bees/one")
    data = make("folder", root)
    assert (data.train.paths, data.classes) == (paths, ["ants", "bees"])
    assert data.note.startswith("6 files left out: a link to a folder that holds it (")

    # A link to another folder is followed, as ever.
    (root / "train/ants/more").symlink_to(root / "train/bees")
    assert "train/ants/more/b.png" in make("folder", root).train.paths


def test_class_names_of_one_text_are_one_class_however_they_are_spelt(
    root: Path,
) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    picture(root / "train" / decomposed / "a.png")
    picture(root / "val" / composed / "a.png")
    data = make("folder", root)
    assert data.classes == ["ants", "bees", composed]
    assert data.val.targets == [1, 2]
    picture(root / "train" / composed / "b.png")
    assert "two folders named café" in error_text(DataError, "folder", root)


@pytest.mark.parametrize("place", [b"train/ants/\xff.png", b"train/b\xe4r/a.png"])
def test_a_name_that_is_not_utf8_is_refused(root: Path, place: bytes) -> None:
    path = picture(Path(os.fsdecode(os.fsencode(root) + b"/" + place)))
    assert decode(path).shape == (3, 4, 6)  # a file to predict may have any name
    message = error_text(DataError, "folder", root)
    assert ("\\xff.png" in message) or ("b\\xe4r" in message)
    assert message.encode() and "is not UTF-8" in message


def test_a_folder_that_may_not_be_read_is_not_skipped(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def guarded(path: Any) -> Any:
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    message = error_text(DataError, "folder", root)
    assert f"{root / 'train/ants/sub'} cannot be read: Permission denied" in message


# --- cifar10 and mnist, from small files in torchvision's formats


def idx(array: np.ndarray) -> bytes:
    """MNIST's file format: a magic number, the sizes (big-endian), the bytes."""
    header = np.array([0x0800 + array.ndim, *array.shape], dtype=">i4")
    return header.tobytes() + array.astype(np.uint8).tobytes()


def test_mnist_is_read_from_its_raw_files(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (7, 28, 28), dtype=np.uint8)
    for part, count in (("train", 7), ("t10k", 4)):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(images[:count]))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(count)))
    main_first = MainFirst()
    data = make("mnist", tmp_path, main_first)
    assert (len(data.train), len(data.val)) == (7, 4)
    assert (
        data.train.images.shape == (7, 1, 28, 28)
        and data.train.images.dtype == torch.uint8
    )
    assert np.array_equal(data.train.images[:, 0].numpy(), images)
    assert data.val.targets.dtype == torch.int64 and data.val.targets.tolist() == [
        0,
        1,
        2,
        3,
    ]
    assert data.classes == list("0123456789")
    assert main_first.entered == 0

    make("mnist", tmp_path, main_first, download=True)  # nothing is left to download
    assert main_first.entered == 1

    for content in (idx(images[:4])[:-1], b"<html>not the file</html>", b""):
        (raw / "t10k-images-idx3-ubyte").write_bytes(content)
        assert "missing or damaged" in error_text(DataError, "mnist", tmp_path)


def test_cifar10_is_read_from_its_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are small ones of ours, so torchvision's table of checksums is given theirs."""
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)

    def write(name: str, content: dict[str, Any]) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    batches = [{"data": pixels[i : i + 1], "labels": [i]} for i in range(5)]
    train_list = [
        write(f"data_batch_{i + 1}", batch) for i, batch in enumerate(batches)
    ]
    monkeypatch.setattr(CIFAR10, "train_list", train_list)
    monkeypatch.setattr(
        CIFAR10, "test_list", [write("test_batch", {"data": pixels[5:], "labels": [9]})]
    )
    names = [f"class {i}" for i in range(10)]
    filename, md5 = write("batches.meta", {"label_names": names})
    monkeypatch.setattr(
        CIFAR10, "meta", {"filename": filename, "key": "label_names", "md5": md5}
    )

    data = make("cifar10", tmp_path)
    assert torch.equal(
        data.train.images, torch.from_numpy(pixels[:5]).view(5, 3, 32, 32)
    )
    assert data.train.images.is_contiguous()
    assert data.train.targets.dtype == torch.int64 and data.train.targets.tolist() == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert torch.equal(data.val.images, torch.from_numpy(pixels[5:]).view(1, 3, 32, 32))
    assert (data.val[0][1], data.classes) == (9, names)

    (folder / "test_batch").unlink()
    assert "missing or damaged" in error_text(DataError, "cifar10", tmp_path)


def test_missing_files_are_one_error_that_says_what_to_do(tmp_path: Path) -> None:
    for name, address, directory in (
        ("cifar10", CIFAR10.url, str(tmp_path)),
        ("mnist", MNIST.mirrors[0], str(tmp_path / "MNIST" / "raw")),
    ):
        message = error_text(DataError, name, tmp_path)
        assert name in message and address in message and directory in message
        assert "data.download=true" in message
        assert error_text(ConfigError, name).startswith("data.root: is not set")
        assert error_text(ConfigError, name, tmp_path, download="yes").startswith(
            "data.download:"
        )


def test_a_failed_download_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MNIST, "mirrors", [(tmp_path / "nowhere").as_uri() + "/"])
    message = error_text(DataError, "mnist", tmp_path, download=True)
    assert "cannot be downloaded" in message and "unpack them in" in message
    assert "data.download=true" not in message


# --- fake


def test_fake_images_are_functions_of_their_id_and_part() -> None:
    first, second = make("fake"), make("fake", size=50)
    assert (len(first.train), len(first.val), len(second.train)) == (1000, 200, 50)
    assert first.classes == [str(name) for name in range(10)]
    for i in (49, 7, 0):
        torch.manual_seed(i)
        image, target = first.train[i]
        assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
        assert torch.equal(image, second.train[i][0])
        assert target == second.train[i][1] and type(target) is int
        assert not torch.equal(image, first.val[i][0])
        assert not torch.equal(image, first.train[i + 10][0])  # of the same class
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    first.train[3]
    assert (
        torch.equal(torch.get_rng_state(), states[0])
        and np.random.get_state()[1].tolist() == states[1]
    )
    with pytest.raises(IndexError):
        second.train[50]


def test_fake_images_take_any_shape_and_all_classes() -> None:
    data = make(
        "fake", size=14, image_size=[5, 9], channels=1, num_classes=7, val_size=3
    )
    assert data.train[0][0].shape == (1, 5, 9)
    assert sorted(target for _, target in data.train) == sorted(2 * list(range(7)))
    assert data.classes == list("0123456") and len(data.val) == 3
    assert make("fake", image_size=1).train[0][0].shape == (3, 1, 1)


def test_a_huge_fake_set_costs_nothing() -> None:
    make("fake")
    tracemalloc.start()
    start = time.process_time()
    data = make("fake", size=100_000_000)
    seconds = time.process_time() - start
    data.train[99_999_999]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(data.train) == 100_000_000
    assert seconds < 0.1 and peak < 1_000_000  # bytes
    assert len(pickle.dumps(data.train)) < 1000


def test_fake_images_can_be_learned() -> None:
    """The class means of the training images tell the classes of the validation images."""
    data = make("fake", size=200, val_size=100, image_size=16)
    images, targets = zip(*data.train, strict=True)
    flat, labels = torch.stack(images).flatten(1).double(), torch.tensor(targets)
    means = torch.stack([flat[labels == name].mean(0) for name in range(10)])
    val, val_targets = zip(*data.val, strict=True)
    guesses = torch.cdist(torch.stack(val).flatten(1).double(), means).argmin(1)
    assert (guesses == torch.tensor(val_targets)).double().mean() > 0.95


@pytest.mark.parametrize(
    ("args", "key"),
    [
        ({"size": 0}, "data.size"),
        ({"size": "many"}, "data.size"),
        ({"val_size": 1.5}, "data.val_size"),
        ({"channels": True}, "data.channels"),
        ({"num_classes": -1}, "data.num_classes"),
        ({"image_size": [3]}, "data.image_size"),
        ({"image_size": [3, 0]}, "data.image_size"),
        ({"sise": 3}, "data.sise"),
    ],
)
def test_wrong_arguments_of_fake_are_named(args: dict[str, Any], key: str) -> None:
    assert error_text(ConfigError, "fake", **args).startswith(f"{key}: ")


# --- names and import paths

OWN_DATA_SETS = """
import torch
from torch.utils.data import Dataset, IterableDataset

class Own(Dataset):
    classes = ["cat", "dog"]
    def __init__(self, size, what, root=None):
        self.size, self.what, self.root = size, what, root
    def __len__(self):
        return self.size
    def __getitem__(self, i):
        return torch.zeros(3, 2, 2), i % 2

class ByTrain(Own):
    def __init__(self, train, size=5, root=None):
        super().__init__(size if train else 2, train, root)

class BySplit(Own):
    classes = [1, 2]
    def __init__(self, root, split, download=False):
        super().__init__(3, split, root)

def pair(size):
    return Own(size, "first"), Own(size + 1, "second")

def alone(**anything):
    return Own(4, "alone", **anything)

def no_val(train):
    return Own(4, "alone") if train else None

class Stream(IterableDataset):
    def __init__(self, train): ...
    def __len__(self):
        return 3
    def __iter__(self):
        yield from range(3)

def no_length():
    return iter([])

def empty(train):
    return Own(3 if train else 0, "")

def bad(train):
    raise ValueError("no such moon")
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_data_sets.py").write_text(OWN_DATA_SETS)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("own")
def test_an_import_path_is_called_for_each_part() -> None:
    data = make("own_data_sets.ByTrain", size=7)
    assert (len(data.train), data.train.what, len(data.val), data.val.what) == (
        7,
        True,
        2,
        False,
    )
    assert (data.classes, data.name, data.train.root) == (
        ["cat", "dog"],
        "own_data_sets.ByTrain",
        None,
    )
    assert make("own_data_sets.ByTrain", "here").val.root == "here"

    main_first = MainFirst()
    data = make("own_data_sets.BySplit", "there", main_first, download=True)
    assert (data.train.what, data.val.what, data.val.root) == ("train", "val", "there")
    assert (data.classes, main_first.entered) == (None, 1)


@pytest.mark.usefixtures("own")
def test_an_import_path_without_a_part_argument_is_called_once() -> None:
    data = make("own_data_sets.pair", size=3)
    assert (data.train.what, data.val.what, len(data.val)) == ("first", "second", 4)
    data = make("own_data_sets.alone", "here")
    assert (data.train.what, data.train.root, data.val) == ("alone", "here", None)
    assert make("own_data_sets.no_val").val is None


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("error", "name", "root", "args", "text"),
    [
        (
            ConfigError,
            "Stream",
            None,
            {},
            "data.name: the training part of own_data_sets.Stream is",
        ),
        (ConfigError, "no_length", None, {}, "list_iterator"),
        (
            DataError,
            "empty",
            None,
            {},
            "the validation part of own_data_sets.empty holds no samples",
        ),
        (ConfigError, "ByTrain", None, {"train": True}, "data.train: leave it out"),
        (
            ConfigError,
            "ByTrain",
            None,
            {"sise": 3},
            "data.sise: ByTrain has no such argument; did you mean",
        ),
        (ConfigError, "BySplit", None, {}, "data.root: BySplit needs this argument"),
        (
            ConfigError,
            "pair",
            "here",
            {"size": 3},
            "data.root: own_data_sets.pair takes no root",
        ),
        (ConfigError, "bad", None, {}, "no such moon"),
        (ConfigError, "ByTrian", None, {}, 'did you mean "ByTrain"?'),
    ],
)
def test_wrong_import_paths_are_named(
    error: type[Exception], name: str, root: str | None, args: dict[str, Any], text: str
) -> None:
    assert text in error_text(error, f"own_data_sets.{name}", root, **args)


def test_wrong_names_are_named() -> None:
    assert 'did you mean "cifar10"?' in error_text(ConfigError, "cifar")
    assert error_text(ConfigError, "digits", "/somewhere").startswith(
        "data.root: digits takes no root"
    )
    assert error_text(ConfigError, "digits", size=3).startswith(
        "data.size: digits has no such argument"
    )
