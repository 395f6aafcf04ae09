"""Batches of decoded images with channels together until they are normalised: what torchvision and torch give."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.transforms import v2

from tests.noise_files import write_noise
from trainer.config.data_section import DataConfig
from trainer.data.batches import MicroBatch, Request
from trainer.data.datasets import MapDataset, build_datasets
from trainer.data.decoding import decode
from trainer.data.loading import Loader, build_loader
from trainer.data.stacking import stack_decoded

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
IDS = np.array([3, 0, 2])
COUNT = 4
VALIDATION: list[dict[str, Any]] = [
    {"name": "Resize", "size": 24},
    {"name": "CenterCrop", "size": 20},
]


class Photos:
    """PIL images: a data set of somebody's own."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        with Image.open(self._paths[index]) as image:
            return image.convert("RGB"), index


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PNG files whose short side is 24."""
    root = tmp_path_factory.mktemp("images")
    return write_noise(root, COUNT, lambda _, index: (24 + 3 * index, 24))


def files(root: Path) -> list[Path]:
    return sorted((root / "val" / "daisy").iterdir())


def loader_of(
    root: Path, dataset: MapDataset, transforms: list[dict[str, Any]], **keys: Any
) -> Loader:
    section = DataConfig(name="folder", root=str(root), mean=MEAN, std=STD, **keys)
    return build_loader(
        section,
        dataset,
        "val",
        transforms,
        seed=5,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def folder(root: Path) -> MapDataset:
    section = DataConfig(name="folder", root=str(root))
    data = build_datasets(section, Any).val  # type: ignore[arg-type]
    assert data is not None
    return data


def normalized(images: Tensor) -> Tensor:
    result = images.to(torch.float32).mul_(torch.tensor(1 / 255))
    result -= torch.tensor(MEAN).view(3, 1, 1)
    result /= torch.tensor(STD).view(3, 1, 1)
    return result


@pytest.mark.parametrize(("is_own", "workers"), [(False, 0), (True, 0), (False, 1)])
def test_a_batch_is_what_torchvision_and_torch_make_of_it(
    root: Path, is_own: bool, workers: int
) -> None:
    transform = v2.Compose([v2.Resize(24), v2.CenterCrop(20)])
    images = [transform(decode(files(root)[index])) for index in IDS.tolist()]
    expected = torch.stack(images)
    dataset = Photos(files(root)) if is_own else folder(root)
    made = loader_of(root, dataset, VALIDATION, workers=workers)
    [loaded] = list(made.load([Request(0, 0, IDS)]))
    assert isinstance(loaded, MicroBatch)
    assert torch.equal(loaded.inputs, expected)
    assert loaded.inputs.is_contiguous(memory_format=torch.channels_last)
    assert loaded.inputs.is_shared() == bool(workers)
    assert torch.equal(loaded.targets, torch.tensor(IDS if is_own else [0, 0, 0]))
    [batch] = list(made.place(iter([loaded])))
    assert torch.equal(batch.inputs, normalized(expected))
    assert batch.inputs.is_contiguous()


def test_transforms_of_batches_get_them_as_torch_stacks_them(
    root: Path,
) -> None:
    section = DataConfig(
        name="folder", root=str(root), batch_transforms=[{"name": "RandomErasing"}]
    )
    made = build_loader(
        section,
        folder(root),
        "train",
        VALIDATION,
        seed=5,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    assert made.fetch(IDS).inputs.is_contiguous()


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(3, 5, 7, dtype=torch.uint8),  # channels apart
        torch.zeros(3, 5, 7),
        torch.zeros(1, 5, 7, dtype=torch.uint8),
        torch.zeros(7, 5, 3, dtype=torch.uint8).permute(2, 1, 0),
        torch.zeros(5, 6, 3, dtype=torch.uint8).permute(2, 0, 1),
        {"left": torch.zeros(3, 5, 7, dtype=torch.uint8)},
    ],
)
def test_anything_else_is_left_to_torch(other: Any) -> None:
    image = torch.ones(5, 7, 3, dtype=torch.uint8).permute(2, 0, 1)
    is_same_size = isinstance(other, Tensor) and other.shape == image.shape
    batch = stack_decoded([image, other])
    if is_same_size and other.dtype == torch.uint8 and other.stride(0) == 1:
        assert batch is not None
        assert torch.equal(batch, default_collate([image, other]))
    else:
        assert batch is None
