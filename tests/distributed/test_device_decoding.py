"""`data.decode=device`, with a stand-in for nvJPEG of libjpeg's pixels: the run is that of the CPU's decoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.device_decoders import device_that_decodes
from tests.distributed.ranks import on_ranks
from tests.distributed.small import HASHES, config
from tests.image_damage import encode
from trainer import Config, Trainer
from trainer.inspection.replay import replay

BATCH_TRANSFORMS = [
    {"name": "RandomResizedCrop", "size": 12, "scale": [0.3, 1.0]},
    {"name": "RandomHorizontalFlip"},
]
BAD = {"cut.jpg", "no_tables.jpg", "text.jpg"}


def make_images(root: Path) -> None:
    """Images of several sizes and kinds in two classes; in `bad/`, some that cannot be decoded among them."""
    draws = np.random.default_rng(0)
    turned = Image.Exif()
    turned[0x0112] = 6
    for folder, bad in (("images", False), ("bad", True)):
        for part, count in (("train", 9), ("val", 3)):
            for level, name in enumerate(("dark", "light")):
                files = {}
                for index in range(count):
                    shape = (20 + 7 * index, 40 - 3 * index, 3)
                    pixels = draws.integers(0, 128, shape) + 100 * level
                    image = Image.fromarray(pixels.astype(np.uint8))
                    files[f"{index}.jpg"] = encode(image, "JPEG")
                files["grey.jpg"] = encode(image.convert("L"), "JPEG")
                files["turned.jpg"] = encode(image, "JPEG", exif=turned)
                files["progressive.jpg"] = encode(image, "JPEG", progressive=True)
                files["a.png"] = encode(image.convert("RGBA"), "PNG")
                if bad and part == "train" and level:
                    files |= _bad_files(files["1.jpg"])
                place = root / folder / part / name
                place.mkdir(parents=True)
                for file, content in files.items():
                    (place / file).write_bytes(content)


def _bad_files(right: bytes) -> dict[str, bytes]:
    """Found to be bad by its head, by the CPU's decoder as it has no end, and by decoding alone."""
    table = right.index(b"\xff\xc4") + 5
    tables = right[:table] + bytes(16 * [255]) + right[table + 16 :]
    return dict(zip(sorted(BAD), (right[:300], tables, b"no image"), strict=True))


def settings(root: Path, name: str, **changes: Any) -> Config:
    keys = {
        "run__name": name,
        "run__reproducibility": "bitwise",
        "run__resume": "auto",
        "data__name": "folder",
        "data__root": str(root / "images"),
        "data__decode": "device",
        "data__batch_transforms": BATCH_TRANSFORMS,
        "data__val_transforms": [{"name": "Resize", "size": [12, 12]}],
        "batch__size": 8,
        "batch__micro_size": 2,
        "train__epochs": 2,
    }
    return config(root / "runs", **(keys | changes))


def fit(root: Path, name: str, **changes: Any) -> list[Any]:
    with device_that_decodes():
        trainer = Trainer(settings(root, name, **changes))
        summary = trainer.fit()
    bad = trainer.run.quarantine.samples if trainer.run.quarantine else []
    names = sorted(Path(sample.path).name for sample in bad)
    return [[summary[key] for key in HASHES], trainer.progress.history, names]


def several(root: Path, **changes: Any) -> list[list[Any]]:
    """A run that is stopped and resumed, and one that leaves out bad samples, with loader processes and without."""
    fit(root, "cut", train__stop_after=2, data__workers=1, **changes)
    resumed = fit(root, "cut", **changes)
    quarantine = {"data__root": str(root / "bad"), "data__bad_samples": "quarantine"}
    return [resumed, fit(root, "bad", data__workers=1, **quarantine, **changes)]


@pytest.fixture(scope="module")
def by_cpu(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[Any]]]:
    root = tmp_path_factory.mktemp("cpu")
    make_images(root)
    return root, on_ranks(1, several, root, data__decode="cpu")[0]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_equal_to_the_cpus_on_any_ranks_resumed_and_without_bad_samples(
    tmp_path: Path, by_cpu: tuple[Path, list[list[Any]]], ranks: int
) -> None:
    root, expected = by_cpu
    for folder in ("images", "bad"):
        (tmp_path / folder).symlink_to(root / folder)
    assert set(expected[1][2]) == BAD
    for of_rank in on_ranks(ranks, several, tmp_path):
        assert of_rank == expected
    if ranks == 1:
        for found in on_ranks(1, replayed, tmp_path)[0]:
            assert found
            assert all(was == now for was, now in found.values())


def replayed(root: Path) -> Any:
    with device_that_decodes():
        result = replay(
            lambda: Trainer(settings(root, "replay")), root / "runs" / "cut", 3
        )
    return result.digests, result.logged
