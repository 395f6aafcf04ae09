"""`data.cache=decoded` and `data.short_side`: what images are made of, where they are kept, and what may go wrong."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from trainer.__main__ import main
from trainer.config.data_section import DataConfig
from trainer.config.fields import read_section
from trainer.config.schema import Config
from trainer.core.decoded_images import with_decoded_images
from trainer.data.batches import MicroBatch, Request
from trainer.data.datasets import Datasets, build_datasets
from trainer.data.decoding import decode
from trainer.data.fast_crop import fast_form
from trainer.data.image_reading import ImageReading
from trainer.data.image_store import ABOUT_FILE, ImageStore
from trainer.data.samples import KeyedDataset
from trainer.data.short_side import choose_short_side, shrink, with_short_side
from trainer.data.transform_sizes import check_image_sizes
from trainer.errors import ConfigError, DataError, LockstepError
from trainer.process.ranks import Ranks
from trainer.storage import cache_build
from trainer.storage.cache_build import open_or_build
from trainer.storage.decoded_cache import CacheSource

FORK = multiprocessing.get_context("fork")
IMAGES = 20  # of each class and part: 80 in all, 5 chunks
SIDE = 24


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """JPEG files, most of them larger than `SIDE`, of two classes and parts."""
    draws = np.random.default_rng(0)
    folder = tmp_path / "flowers"
    for part in ("train", "val"):
        for name in ("daisy", "tulip"):
            place = folder / part / name
            place.mkdir(parents=True)
            for index in range(IMAGES):
                height, width = draws.integers(16, 64, 2)
                pixels = draws.integers(0, 256, (height, width, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{index:02}.jpg")
    return folder


class Silent:
    """Counts what a build tells."""

    def __init__(self) -> None:
        self.images = self.size = self.done = 0

    def begin(self, folder: Path, images: int, size: int) -> None:
        self.images, self.size = images, size

    def advance(self, images: int) -> None:
        self.done += images

    def end(self) -> None:
        pass


def source(
    root: Path, decoded: Callable[[str], object] = str, **more: Any
) -> CacheSource:
    """All images of `root`; `decoded` is told of each that is decoded."""

    def decode_small(path: str) -> Tensor:
        decoded(path)
        return shrink(decode(root / path), SIDE)

    paths = sorted(str(path.relative_to(root)) for path in root.rglob("*.jpg"))
    values = CacheSource(root, paths, ImageReading(short_side=SIDE), decode_small)
    return replace(values, **more)


def build(root: Path, *decoded: Callable[[str], object], **more: Any) -> ImageStore:
    return open_or_build(
        root.parent / "cache", source(root, *decoded, **more), 2, Silent()
    )


def holds_all(store: ImageStore, root: Path) -> bool:
    return all(
        torch.equal(store.image(number), shrink(decode(root / path), SIDE))  # type: ignore[arg-type]
        for path, number in store.numbers.items()
    )


def datasets(root: Path, **more: Any) -> Datasets:
    section = DataConfig(name="folder", root=str(root), **more)
    data = build_datasets(section, Any)  # type: ignore[arg-type]
    return with_decoded_images(section, Ranks("fp32"), data)


# --- the short side


@pytest.mark.parametrize("size", [(40, 90), (90, 41), (50, 50), (24, 30), (20, 200)])
def test_a_shrunk_image_is_what_torchvision_makes_of_it(size: tuple[int, int]) -> None:
    draw = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (3, *size), generator=draw, dtype=torch.uint8)
    expected = image if min(size) <= SIDE else functional.resize(image, [SIDE])
    torch.set_num_threads(3)
    try:
        on_three_threads = shrink(image, SIDE)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(shrink(image, SIDE), expected)
    assert torch.equal(on_three_threads, expected)
    assert shrink(image, None) is image


CROP = {"name": "RandomResizedCrop", "size": 224}
FLIP = {"name": "RandomHorizontalFlip"}
RESIZE = {"name": "Resize", "size": 232}


@pytest.mark.parametrize(
    "train, val, expected",
    [
        ([CROP, FLIP], [RESIZE], 256),
        ([FLIP, CROP], [RESIZE | {"size": 288}], 288),
        ([RESIZE | {"size": [100, 180]}], [RESIZE | {"size": [64]}], 180),
        ([{"name": "RandomShortestSize", "min_size": [90, 120]}], [RESIZE], 232),
        # What reads pixels at their own scale, or leaves nothing to say how large an image has to be.
        ([{"name": "RandomCrop", "size": 224}], [RESIZE], None),
        ([{"name": "my_package.Mine"}, CROP], [RESIZE], None),
        ([RESIZE | {"interpolation": "bicubic"}], [RESIZE], None),
        ([CROP], [], None),
    ],
)
def test_auto_is_what_the_transforms_need(
    train: list[dict[str, Any]], val: list[dict[str, Any]], expected: int | None
) -> None:
    section = DataConfig(
        cache="decoded", cache_dir="x", train_transforms=train, val_transforms=val
    )
    assert choose_short_side(section).pixels == expected
    config = with_short_side(Config(data=section))
    assert config.data.short_side == (expected or "auto")
    # Transforms of whole micro-batches come after those of samples.
    for split in range(len(train)):
        moved = replace(
            section, train_transforms=train[:split], batch_transforms=train[split:]
        )
        assert choose_short_side(moved).pixels == expected
    assert choose_short_side(replace(section, cache=0.0)).pixels is None
    assert choose_short_side(replace(section, short_side=30)).pixels == 30
    # What is chosen is never refused, as where a run goes on by its config.yaml.
    check_image_sizes(config.data)


@pytest.mark.parametrize(
    "transforms, least",
    [
        ([FLIP, CROP], 224),
        ([RESIZE | {"size": [100, 180]}, CROP], 180),
        ([{"name": "RandomCrop", "size": 40}], 40),
        ([{"name": "RandomShortestSize", "min_size": [90, 120]}], 120),
        ([RESIZE | {"interpolation": "bicubic"}], 232),
        # A later one is given what the first one makes.
        ([RESIZE | {"size": 28}, {"name": "Pad", "padding": 2}, CROP], 28),
        # One within another may be left out.
        ([{"name": "RandomApply", "transforms": [RESIZE]}, CROP], 232),
        ([{"name": "RandomApply", "transforms": [FLIP]}, CROP], 224),
    ],
)
@pytest.mark.parametrize(
    "place", ["train_transforms", "val_transforms", "batch_transforms", "test"]
)
@pytest.mark.parametrize("key", ["short_side", "decode_short_side"])
def test_images_made_smaller_than_the_transforms_ask_for(
    transforms: list[dict[str, Any]], least: int, place: str, key: str
) -> None:
    value: Any = (
        transforms if place != "test" else {"transforms": transforms, "root": "y"}
    )
    section = DataConfig(name="folder", root="x", **{place: value})
    check_image_sizes(section)
    check_image_sizes(replace(section, **{key: least}))
    with pytest.raises(ConfigError, match=f"set it to {least} or more") as caught:
        build_datasets(replace(section, **{key: least - 1}), Any)  # type: ignore[arg-type]
    assert caught.value.key == f"data.{key}"


def test_images_made_smaller_for_a_transform_of_ones_own() -> None:
    own = [{"name": "my_package.Mine", "size": 50}]
    sides = {"short_side": 1, "decode_short_side": 1}
    check_image_sizes(DataConfig(train_transforms=own, **sides))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"cache": "decoded"}, "data.cache_dir: is not set"),
        ({"cache": "decoded", "cache_dir": " "}, "data.cache_dir: is empty"),
        (
            {"cache": "decode", "cache_dir": "x"},
            "data.cache: decode is not a number or decoded",
        ),
        ({"short_side": 0}, "data.short_side: 0 is less than 1"),
        ({"short_side": "half"}, "data.short_side: half is not an integer or"),
    ],
)
def test_a_wrong_key_is_one_clear_message(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig(**changes)


def test_other_data_sets_refuse_both_keys() -> None:
    cached: dict[str, Any] = {"cache": "decoded", "cache_dir": "x"}
    for changes in (cached, {"short_side": 20}):
        section = read_section(DataConfig, {"name": "digits", **changes})
        with pytest.raises(ConfigError, match=r"images of data.name=folder, not"):
            build_datasets(section, Any)  # type: ignore[arg-type]


# --- the samples


def test_samples_are_those_of_the_files(root: Path, tmp_path: Path) -> None:
    """With a cache, in another process, and in memory: each is what is decoded and made small when it is read."""
    plain = datasets(root, short_side=SIDE)
    in_memory = datasets(root, short_side=SIDE, cache=1.0)
    cache = {"cache": "decoded", "cache_dir": str(tmp_path / "cache")}
    cached = datasets(root, short_side=SIDE, **cache)
    sent = pickle.loads(pickle.dumps(cached))
    for data in (in_memory, cached, sent):
        for part in ("train", "val"):
            images, expected = getattr(data, part), getattr(plain, part)
            for index in range(2 * IMAGES):
                assert torch.equal(images[index][0], expected[index][0])
                assert images[index][1] == expected[index][1]
                images[index][0].zero_()  # what is written into an image stays there
            assert torch.equal(images[3][0], expected[3][0])
    assert min(plain.train[0][0].shape[1:]) <= SIDE
    assert "short side 24 (data.short_side) · decoded in" in cached.images


def test_a_split_of_its_own_needs_no_cache_of_its_own(root: Path) -> None:
    data = datasets(
        root, short_side=SIDE, cache="decoded", cache_dir=str(root.parent / "c")
    )
    train: Any = data.train
    chosen = train.select([1, 5, 30])
    for index, of_whole in enumerate((1, 5, 30)):
        assert torch.equal(chosen[index][0], train[of_whole][0])


def batch_of(dataset: Any, transform: Any) -> Tensor:
    keyed = KeyedDataset(dataset, transform, seed=0, purpose="train")
    loaded = keyed[Request(0, 0, np.arange(2 * IMAGES))]
    assert isinstance(loaded, MicroBatch)
    images: Tensor = loaded.inputs
    return images


def negate_in_place(image: Tensor) -> Tensor:
    return image.bitwise_not_()


def test_transforms_draw_and_give_the_same_and_never_change_the_cache(
    root: Path, tmp_path: Path
) -> None:
    plain = datasets(root, short_side=SIDE).train
    cache_dir = str(tmp_path / "cache")
    cached = datasets(root, short_side=SIDE, cache="decoded", cache_dir=cache_dir).train
    crop = v2.Compose([v2.RandomResizedCrop(16), v2.RandomHorizontalFlip()])
    writing = v2.Compose([v2.CenterCrop(16), v2.Lambda(negate_in_place)])
    for transform in (crop, writing, v2.CenterCrop(16), writing, crop):
        assert torch.equal(batch_of(cached, transform), batch_of(plain, transform))


@pytest.mark.parametrize(
    "crop",
    [
        v2.RandomResizedCrop(48),
        v2.RandomResizedCrop([20, 33], scale=(0.5, 0.9)),
        v2.RandomResizedCrop(30, scale=(1, 1), ratio=(80 / 61, 80 / 61)),
        v2.RandomResizedCrop(30, interpolation=v2.InterpolationMode.BICUBIC),
        v2.RandomResizedCrop(30, antialias=False),
        # Of no part that lies within the image.
        v2.RandomResizedCrop(30, scale=(2, 3)),
        v2.RandomResizedCrop(30, scale=(1, 1), ratio=(5, 6)),
        v2.RandomResizedCrop(30, scale=(1, 1), ratio=(0.1, 0.2)),
        v2.RandomHorizontalFlip(),
        v2.RandomHorizontalFlip(0.9),
        v2.Resize(61),
        v2.Resize([61, 80]),
        v2.Resize([80, 61]),
        v2.Resize(40),
        v2.Resize(61, max_size=70),
        v2.Resize(None, max_size=61),
        v2.CenterCrop(48),
        v2.CenterCrop([60, 77]),  # halves of a pixel are left over
        v2.CenterCrop([61, 80]),
        v2.CenterCrop([70, 30]),
    ],
)
def test_the_fast_form_gives_the_bits_of_torchvisions(crop: Any) -> None:
    draw = torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 256, (61, 80, 3), generator=draw, dtype=torch.uint8)
    decoded = pixels.permute(2, 0, 1)
    fast = fast_form(crop)
    for image in (decoded, decoded.contiguous(), decoded[:1], decoded.float()):
        for seed in range(10):
            torch.manual_seed(seed)
            expected, state = crop(image), torch.get_rng_state()
            torch.manual_seed(seed)
            result = fast(image)
            assert torch.equal(result, expected)
            assert result.stride() == expected.stride()
            assert torch.equal(torch.get_rng_state(), state)


# --- making it


def test_it_is_made_once_and_again_when_a_file_changed(root: Path) -> None:
    decoded: list[str] = []
    progress = Silent()
    first = open_or_build(
        root.parent / "cache", source(root, decoded.append), 2, progress
    )
    assert holds_all(first, root)
    assert sorted(decoded) == list(first.numbers)
    assert progress.done == progress.images == len(decoded) == 4 * IMAGES
    assert first.size / 2 < progress.size < first.size * 2
    assert build(root, decoded.append).folder == first.folder
    assert len(decoded) == 4 * IMAGES
    # Other pixels, with the size and the time of the old ones: what a build must not miss.
    path = root / "train" / "daisy" / "03.jpg"
    state, content = path.stat(), bytearray(path.read_bytes())
    content[-30] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert path.stat().st_size == state.st_size
    again = build(root)
    assert again.folder != first.folder
    assert holds_all(again, root)
    other = ImageReading(max_pixels=10**6, short_side=SIDE)
    assert build(root, reading=other).folder not in (first.folder, again.folder)


@pytest.mark.parametrize("damage", ["byte", "cut", "gone", "table", "sizes"])
def test_a_damaged_chunk_is_made_again_and_no_other(root: Path, damage: str) -> None:
    folder = build(root).folder
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.bin")}
    path = folder / "00002.bin"
    if damage == "byte":
        with path.open("r+b") as file:
            file.seek(100)
            byte = file.read(1)[0]
            file.seek(100)
            file.write(bytes([byte ^ 1]))
    elif damage == "cut":
        os.truncate(path, 1000)
    elif damage == "gone":
        path.unlink()
    elif damage == "table":
        (folder / "00002.json").write_text("{")
    else:
        table = json.loads((folder / "00002.json").read_text())
        table["heights"][3] *= 1000
        (folder / "00002.json").write_text(json.dumps(table))
    decoded: list[str] = []
    assert holds_all(build(root, decoded.append), root)
    assert decoded == source(root).chunk(2)
    for other, mtime in times.items():
        assert other == path or other.stat().st_mtime_ns == mtime


def test_a_copy_of_a_cache_is_a_cache(root: Path, tmp_path: Path) -> None:
    folder = build(root).folder
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(folder, elsewhere / folder.name, copy_function=shutil.copyfile)
    decoded: list[str] = []
    store = open_or_build(elsewhere, source(root, decoded.append), 1, Silent())
    assert not decoded
    assert holds_all(store, root)


def _in_processes(count: int, function: Callable[[], object]) -> list[int | None]:
    """The exit statuses of processes that run `function` at the same time."""
    processes = [FORK.Process(target=function) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    return [process.exitcode for process in processes]


def test_a_kill_in_between_loses_nothing_that_was_complete(root: Path) -> None:
    counted = 0

    def die_late(path: str) -> None:
        nonlocal counted
        counted += 1
        if counted > 50:
            os.kill(os.getpid(), signal.SIGKILL)

    statuses = _in_processes(1, lambda: build(root, die_late))
    assert statuses == [-signal.SIGKILL]
    (folder,) = (root.parent / "cache").iterdir()
    complete = sorted(folder.glob("0*.json"))
    assert 1 <= len(complete) < 5
    decoded: list[str] = []
    assert holds_all(build(root, decoded.append), root)
    assert len(decoded) == 4 * IMAGES - 16 * len(complete)
    assert not list(folder.glob(".partial*"))


def test_processes_at_once_share_the_work(root: Path, tmp_path: Path) -> None:
    """Three, as ranks of a run or as runs of their own: no image is decoded twice, and each gets them all."""
    log = tmp_path / "log"

    def note(path: str) -> None:
        with log.open("a") as file:
            file.write(f"{path} {os.getpid()}\n")
        time.sleep(
            0.02
        )  # so that the first process is not done before the others begin

    def build_and_check() -> None:
        assert holds_all(build(root, note), root)

    assert _in_processes(3, build_and_check) == [0, 0, 0]
    lines = [line.split() for line in log.read_text().splitlines()]
    assert sorted(path for path, _ in lines) == source(root).paths
    assert len({process for _, process in lines}) > 1


def test_a_full_disk_is_said_before_and_when_it_fills(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(root)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ConfigError, match=r"data.cache_dir: .* 0.0 MB free, and the"):
        build(root)
    monkeypatch.undo()

    def fill(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cache_build, "write_table", fill)
        with pytest.raises(LockstepError, match=r"is full .* make room"):
            build(root)
    assert holds_all(build(root), root)
    file = root.parent / "file"
    file.touch()
    message = r"data.cache_dir: .* cannot be written .* data.cache=0 data.short_side=\d"
    with pytest.raises(ConfigError, match=message):
        open_or_build(file, source(root), 1, Silent())


def test_a_cache_among_the_images_is_refused_before_it_is_made(root: Path) -> None:
    """The next run would take it for a class without images."""
    cache_dir = root / "train"
    with pytest.raises(ConfigError, match=r"data.cache_dir: .* lies within the images"):
        datasets(root, short_side=SIDE, cache="decoded", cache_dir=str(cache_dir))
    assert sorted(path.name for path in cache_dir.iterdir()) == ["daisy", "tulip"]
    hidden = str(root / ".cache")
    datasets(root, short_side=SIDE, cache="decoded", cache_dir=hidden)
    datasets(root, short_side=SIDE, cache="decoded", cache_dir=hidden)


def test_a_bad_image_ends_the_build_or_is_bad_when_it_is_read(
    root: Path, tmp_path: Path
) -> None:
    bad = root / "train" / "daisy" / "05.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    cache = {"cache": "decoded", "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(DataError, match=r"05\.jpg cannot be decoded"):
        datasets(root, short_side=SIDE, **cache)
    train = datasets(root, short_side=SIDE, bad_samples="quarantine", **cache).train
    with pytest.raises(DataError, match=r"05\.jpg cannot be decoded"):
        train[5]
    assert torch.equal(train[6][0], datasets(root, short_side=SIDE).train[6][0])


# --- listing and clearing


def test_caches_are_listed_and_cleared_unless_they_are_in_use(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = build(root)
    cache_dir = store.folder.parent
    (cache_dir / "something else").mkdir()
    assert main(["cache", "list", str(cache_dir)]) == 0
    line = capsys.readouterr().out
    assert line.startswith(f"{store.folder.name} · 80 images of {root} · short side 24")
    assert "not complete" not in line
    assert main(["cache", "clear", str(cache_dir), store.folder.name]) == 0
    assert store.folder.is_dir()
    assert "is kept: a run uses it" in capsys.readouterr().out
    store._lock.close()  # type: ignore[union-attr]
    assert main(["cache", "clear", str(cache_dir)]) == 0
    assert "is removed" in capsys.readouterr().out
    assert [path.name for path in cache_dir.iterdir()] == ["something else"]
    assert main(["cache", "clear", str(cache_dir), "flowers"]) == 2
    with pytest.raises(DataError, match="was it deleted while the run used it"):
        pickle.loads(pickle.dumps(store))


def test_listing_outlives_what_a_build_renames_and_what_is_no_cache(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = build(root)
    store._lock.close()  # type: ignore[union-attr]
    cache_dir = store.folder.parent
    (store.folder / ".partial.00000.bin").symlink_to("gone")
    no_cache = cache_dir / "other" / ABOUT_FILE
    no_cache.parent.mkdir()
    keys = ("images", "chunk_size", "short_side", "root", "files")
    no_cache.write_text(json.dumps(dict.fromkeys(keys, "text")))
    assert main(["cache", "list", str(cache_dir)]) == 0
    assert capsys.readouterr().out.count("\n") == 1

    open_file = Path.open

    def read_only(path: Path, mode: str = "r", **more: Any) -> Any:
        if mode.startswith("a"):
            raise OSError(errno.EROFS, "Read-only file system")
        return open_file(path, mode, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", read_only)
        assert main(["cache", "clear", str(cache_dir)]) == 1
    message = f"{store.folder} cannot be removed (Read-only file system)"
    assert message in capsys.readouterr().err


def test_about_says_what_a_cache_holds(root: Path) -> None:
    about = json.loads((build(root).folder / ABOUT_FILE).read_text())
    assert about["root"] == str(root)
    assert (about["images"], about["short_side"]) == (4 * IMAGES, SIDE)
    assert {"torch", "pillow"} <= set(about["decoded_by"])


@pytest.mark.parametrize("damage", ["", "{", '{"images": 0}', None])
def test_a_cache_says_it_again_where_what_it_says_is_damaged(
    root: Path, damage: str | None
) -> None:
    about = build(root).folder / ABOUT_FILE
    written = about.read_text()
    about.unlink() if damage is None else about.write_text(damage)
    decoded: list[str] = []
    build(root, decoded.append)
    assert about.read_text() == written
    assert not decoded
