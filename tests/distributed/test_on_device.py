"""`data.on_device`, `data.batch_transforms`: the same run however it is loaded, on any processes, resumed, replayed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.alike import Results, bits, several
from tests.distributed.ranks import on_ranks
from tests.distributed.small import config, largest_difference
from trainer import Trainer
from trainer.inspection.replay import replay

BATCH_TRANSFORMS = [
    {"name": "RandomCrop", "size": 10, "padding": 2},
    {"name": "RandomHorizontalFlip"},
    {"name": "ColorJitter", "brightness": 0.4, "contrast": 0.2, "saturation": 0.5},
    {"name": "RandomResizedCrop", "size": 8, "scale": [0.4, 1.0]},
    {"name": "RandomErasing", "p": 0.5},
]
# Of images of several sizes; it draws nothing.
RESIZE = [{"name": "Resize", "size": [10, 10]}]
# Some come several times in an epoch.
SAMPLER = {"name": "balanced"}


class Pictures:
    """Images of several sizes; those `bad` cannot be read."""

    classes = tuple("abc")

    def __init__(self, samples: int, bad: frozenset[int] = frozenset()) -> None:
        draw = torch.Generator().manual_seed(4)
        shape = (samples, 3, 12, 14)
        self.images = torch.randint(256, shape, generator=draw).to(torch.uint8)
        self.labels = torch.randint(3, (samples,), generator=draw)
        self.bad = bad

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if i in self.bad:
            raise ValueError("no image")
        return self.images[i, :, : 10 + i % 3], int(self.labels[i])


def net() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def make(directory: Path, stop: int | None = None, **changes: Any) -> Trainer:
    bad = frozenset(changes.pop("bad", ()))
    settings = config(
        directory,
        **{
            "batch__size": 12,
            "batch__micro_size": 4,
            "run__resume": "auto",
            "run__reproducibility": "bitwise",
            "data__on_device": True,
            "data__train_transforms": RESIZE,
            "data__val_transforms": RESIZE,
            "data__batch_transforms": BATCH_TRANSFORMS,
            "data__sampler": SAMPLER,
            **changes,
        },
    )
    if stop is not None:
        settings = replace(settings, train=replace(settings.train, stop_after=stop))
    return Trainer(
        settings,
        model=net(),
        train_data=Pictures(46, bad),
        val_data=Pictures(21, bad),
    )


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    directory = tmp_path_factory.mktemp("reference")
    return directory, on_ranks(1, several, make, directory)[0]


def test_fused_is_what_one_by_one_is(reference: tuple[Path, Results]) -> None:
    _, of_one = reference
    assert largest_difference(of_one.fused, of_one.standard) < 1e-12


def test_equal_from_the_host_and_from_loader_processes(
    tmp_path: Path, reference: tuple[Path, Results]
) -> None:
    _, of_device = reference
    ways: dict[str, dict[str, Any]] = {
        "host": {"data__on_device": False},
        "processes": {"data__on_device": False, "data__workers": 1},
        "read_by_processes": {"data__workers": 1},
    }
    for name, changes in ways.items():
        assert bits(make, tmp_path / name, **changes) == of_device.bits, name


@pytest.mark.parametrize(("ranks", "stop"), [(2, 3), (3, 6)])
def test_equal_on_any_ranks_and_resumed(
    tmp_path: Path, reference: tuple[Path, Results], ranks: int, stop: int
) -> None:
    _, of_one = reference
    stopped = tmp_path / "stopped"
    on_ranks(1, bits, make, stopped, stop)
    # Where the samples lie may change in a resume.
    resumed = {"data__on_device": False}
    for of_rank in on_ranks(ranks, several, make, tmp_path, stopped, **resumed):
        of_rank.assert_alike(of_one)


def without_bad(directory: Path, **changes: Any) -> list[Any]:
    changes |= {"bad": [3, 17, 18], "data__bad_samples": "quarantine"}
    return bits(make, directory, **changes)


def test_bad_samples_are_left_out_alike(tmp_path: Path) -> None:
    from_host = without_bad(tmp_path / "host", data__on_device=False)
    assert without_bad(tmp_path / "device") == from_host
    for of_rank in on_ranks(2, without_bad, tmp_path / "two"):
        assert of_rank == from_host


def test_a_step_is_replayed(tmp_path: Path, reference: tuple[Path, Results]) -> None:
    directory, _ = reference

    def details() -> Any:
        result = replay(lambda: make(tmp_path), directory / "bits" / "run", 3)
        return result.digests, result.logged

    for found in on_ranks(1, details)[0]:
        assert found
        assert all(was == now for was, now in found.values())
