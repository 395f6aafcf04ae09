"""Batches of random crops that are made in one piece of memory: the bits of torchvision's, image by image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from tests.noise_files import write_noise
from trainer.config.data_section import DataConfig
from trainer.data import fast_crop
from trainer.data.batch_transforms.boxes import middle_part
from trainer.data.batch_transforms.resizing import RandomResizedCrop
from trainer.data.batches import Loaded, MicroBatch, Request
from trainer.data.datasets import build_datasets
from trainer.data.decoding import decode
from trainer.data.folder import ImageFolder
from trainer.data.loading import Loader, build_loader
from trainer.data.samples import KeyedDataset
from trainer.exact.seeding import host_state, key, seed_torch

SEED = 5
COUNT = 6  # images of each part
IDS = np.array([4, 1, 0, 1, 5])
TIMES = np.array([0, 0, 0, 1, 0])  # the second 1 comes again
CROP_AND_FLIP: list[dict[str, Any]] = [
    {"name": "RandomResizedCrop", "size": 16},
    {"name": "RandomHorizontalFlip"},
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PNG files of several sizes in one class, but for the last: one of 16 × 16."""

    def sides(draws: np.random.Generator, index: int) -> tuple[int, int]:
        if index == COUNT - 1:
            return 16, 16
        height, width = draws.integers(17, 50, 2)
        return int(height), int(width)

    return write_noise(tmp_path_factory.mktemp("images"), COUNT, sides)


def folder(root: Path) -> ImageFolder:
    section = DataConfig(name="folder", root=str(root))
    images = build_datasets(section, Any).train  # type: ignore[arg-type]
    assert isinstance(images, ImageFolder)
    return images


def one_by_one(images: ImageFolder, transform: Any, epoch: int) -> Tensor:
    """The samples of `IDS` by torchvision alone."""
    results = []
    for sample_id, times in zip(IDS.tolist(), TIMES.tolist(), strict=True):
        seed_torch(key(SEED, "train", epoch, sample_id, *([times] if times else [])))
        image = decode(images.root / images.paths[sample_id])
        results.append(transform(image))
    return torch.stack(results)


def loader(root: Path, transforms: list[dict[str, Any]], **keys: Any) -> Loader:
    section = DataConfig(
        name="folder",
        root=str(root),
        mean=[0.4, 0.5, 0.6],
        std=[0.2, 0.3, 0.4],
        **keys,
    )
    return build_loader(
        section,
        folder(root),
        "train",
        transforms,
        seed=SEED,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


@pytest.mark.parametrize(
    "transforms",
    [
        [v2.RandomResizedCrop(16), v2.RandomHorizontalFlip()],
        [v2.RandomResizedCrop(16)],
        [v2.RandomResizedCrop([20, 33], scale=(0.5, 0.9)), v2.RandomHorizontalFlip(1)],
        # No part is within an image, or all of one of 16 × 16 is taken as it is.
        [v2.RandomResizedCrop(16, scale=(1, 1), ratio=(1, 1)), v2.RandomHorizontalFlip()],
    ],
)  # fmt: skip
@pytest.mark.parametrize("leaves_out", [False, True])
def test_a_batch_has_the_bits_of_torchvisions(
    root: Path, transforms: list[Any], leaves_out: bool
) -> None:
    images, transform = folder(root), v2.Compose(transforms)
    keyed = KeyedDataset(
        images, transform, seed=SEED, purpose="train", leaves_out=leaves_out
    )
    for epoch in range(4):
        expected = one_by_one(images, transform, epoch)
        item = keyed[Request(0, epoch, IDS, occurrences=TIMES)]
        batch = item.batch if isinstance(item, Loaded) else item
        assert isinstance(batch, MicroBatch)
        assert torch.equal(batch.inputs, expected)
        assert torch.equal(batch.targets, torch.zeros(len(IDS), dtype=torch.int64))
        assert batch.inputs.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "last",
    [
        v2.RandomVerticalFlip(),
        v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32, scale=True),
    ],
)
def test_another_chain_is_made_sample_by_sample(root: Path, last: Any) -> None:
    chain = [v2.RandomResizedCrop(16), v2.RandomHorizontalFlip(), last]
    images, transform = folder(root), v2.Compose(chain)
    keyed = KeyedDataset(images, transform, seed=SEED, purpose="train")
    batch = keyed[Request(0, 1, IDS, occurrences=TIMES)]
    assert isinstance(batch, MicroBatch)
    assert torch.equal(batch.inputs, one_by_one(images, transform, 1))
    assert batch.inputs.is_contiguous()
    assert not keyed.keeps_channels_together


def test_a_torch_without_the_kernel_is_no_error(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch._C._nn, "_upsample_bilinear2d_aa")
    fast_crop._is_same.cache_clear()
    try:
        images, transform = folder(root), v2.Compose([v2.RandomResizedCrop(16)])
        keyed = KeyedDataset(images, transform, seed=SEED, purpose="train")
        assert not keyed.keeps_channels_together
    finally:
        fast_crop._is_same.cache_clear()


def test_targets_of_several_classes_are_as_they_were(root: Path) -> None:
    images = folder(root)
    images.targets = [torch.tensor([index, 1]) for index in range(COUNT)]
    transform = v2.Compose([v2.RandomResizedCrop(16), v2.RandomHorizontalFlip()])
    keyed = KeyedDataset(images, transform, seed=SEED, purpose="train")
    batch = keyed[Request(0, 1, IDS, occurrences=TIMES)]
    assert isinstance(batch, MicroBatch)
    assert torch.equal(batch.inputs, one_by_one(images, transform, 1))
    assert batch.targets.tolist() == [[index, 1] for index in IDS]


def test_a_model_sees_channels_apart_and_no_draw_is_left_behind(root: Path) -> None:
    transform = v2.Compose([v2.RandomResizedCrop(16), v2.RandomHorizontalFlip()])
    expected = one_by_one(folder(root), transform, 2).to(torch.float32)
    expected = expected.mul_(torch.tensor(1 / 255))
    expected -= torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    expected /= torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    request = Request(0, 2, IDS, occurrences=TIMES)
    before = host_state()
    for workers in (0, 1):
        made = loader(root, CROP_AND_FLIP, workers=workers)
        assert made.dataset.keeps_channels_together
        [batch] = list(made.run([request]))
        assert torch.equal(batch.inputs, expected)
        assert batch.inputs.is_contiguous()
    assert host_state() == before


class SeesPlanes:
    """A batch transform that changes nothing; notes how the images lie in memory."""

    draws = 0
    contiguous: list[bool] = []  # noqa: RUF012

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        self.contiguous.append(images.is_contiguous())
        return images


def test_batch_transforms_see_channels_apart(root: Path) -> None:
    name = f"{__name__}.{SeesPlanes.__name__}"
    made = loader(root, CROP_AND_FLIP, batch_transforms=[{"name": name}])
    list(made.run([Request(0, 2, IDS)]))
    assert SeesPlanes.contiguous == [True]


def test_a_bad_image_is_left_out_and_named_as_before(
    root: Path, tmp_path: Path
) -> None:
    images = folder(root)
    damaged = tmp_path / images.paths[1]
    for path in images.paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes((root / path).read_bytes())
    damaged.write_bytes(damaged.read_bytes()[:60])
    images.root = tmp_path
    transform = v2.Compose([v2.RandomResizedCrop(16), v2.RandomHorizontalFlip()])
    keyed = KeyedDataset(images, transform, seed=SEED, purpose="train", leaves_out=True)
    item = keyed[Request(0, 0, np.arange(4))]
    assert isinstance(item, Loaded) and item.batch is not None
    assert item.request.ids.tolist() == [0, 2, 3]
    assert [bad.path for bad in item.bad] == [images.paths[1]]
    rest = keyed[item.request]
    assert isinstance(rest, Loaded) and rest.batch is not None
    assert torch.equal(item.batch.inputs, rest.batch.inputs)


@pytest.mark.parametrize(
    ("size", "ratio", "expected"),
    [
        ((40, 1), (3.0, 4.0), (19, 0, 1, 1)),
        ((1, 40), (0.2, 0.3), (0, 19, 1, 1)),
        ((40, 10), (1.0, 2.0), (15, 0, 10, 10)),
    ],
)
def test_the_middle_part_of_a_thin_image_has_a_pixel(
    size: tuple[int, int], ratio: tuple[float, float], expected: tuple[int, ...]
) -> None:
    assert middle_part(*size, *ratio) == expected
    crop = RandomResizedCrop(4, ratio=ratio)
    image = torch.full((1, 3, *size), 7, dtype=torch.uint8)
    draws = torch.zeros((1, crop.draws), dtype=torch.int64)
    assert (crop(image, draws) == 7).all()
