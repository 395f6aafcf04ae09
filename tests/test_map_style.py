"""Streams are refused with the way out, and the formats that are mostly streamed are read by number."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from examples.formats.tar_shards import TarShards
from trainer import Config, ConfigError, Trainer
from trainer.reporting.jsonl import read_rows

ROOT = Path(__file__).parents[1]
SETTINGS: dict[str, Any] = {
    "model": {"name": "small_cnn", "width": 2, "num_classes": 3},
    "batch": {"size": 8},
    "train": {"max_steps": 3, "log_every": 1},
    "run": {"figures": False, "reproducibility": "bitwise"},
    "schedule": {"name": "constant"},
    "wandb": {"mode": "disabled"},
}


class Stream(IterableDataset[Any]):
    """One that even has a length and looks as if it could be indexed."""

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[int]:
        yield from range(2)


def samples() -> TensorDataset:
    return TensorDataset(torch.zeros(4, 1, 8, 8), torch.zeros(4).long())


def generator() -> Iterator[int]:
    yield 1


def hugging_face_stream() -> Any:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"image": [[0.0]], "label": [0]})
    return rows.to_iterable_dataset()


STREAMS: dict[str, tuple[Any, str]] = {
    "a stream": (Stream, "from an index of its files: see docs/map-style.md"),
    "part of a stream": (
        lambda: Subset(Stream(), [0]),
        "from an index of its files: see docs/map-style.md",
    ),
    "a loader": (lambda: DataLoader(samples()), "`loader.dataset`"),
    "Hugging Face's": (hugging_face_stream, "Load it without streaming=True"),
    "a dict of them": (
        lambda: {"train": hugging_face_stream()},
        "Load it without streaming=True",
    ),
    "a generator": (generator, "give a list of them"),
    "a function": (lambda: generator, "Give what it returns"),
    "a set": (lambda: {1, 2}, "it must have __len__ and __getitem__"),
}


def stream(kind: str) -> Any:
    """What a config names."""
    return STREAMS[kind][0]()


@pytest.mark.parametrize("kind", STREAMS)
def test_streams_are_refused_with_the_way_out(kind: str) -> None:
    make, advice = STREAMS[kind]
    name = f"{__name__}.stream"
    sections: list[tuple[str, dict[str, Any]]] = [
        ("data.name", {"name": name, "kind": kind}),
        (
            "data.val.other.name",
            {"name": "digits", "val": {"other": {"name": name, "kind": kind}}},
        ),
    ]
    for key, section in sections:
        with pytest.raises(ConfigError) as caught:
            Trainer(Config.from_dict({**SETTINGS, "data": section}))
        assert str(caught.value).startswith(f"{key}: the ")
        assert advice in str(caught.value)
    for key in ("train_data", "val_data", "test_data"):
        data = {"train_data": samples(), key: make()}
        with pytest.raises(ConfigError) as caught:
            Trainer(Config.from_dict(SETTINGS), **data)
        assert str(caught.value).startswith(key)
        assert advice in str(caught.value)


# ---------------------------------------------------------------- formats


def pictures(count: int) -> list[tuple[Image.Image, int]]:
    draw = np.random.default_rng(count)
    made = []
    for number in range(count):
        noise = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        made.append((Image.fromarray(noise), number % 3))
    return made


def write_shards(root: Path, part: str, count: int) -> None:
    (root / part).mkdir(parents=True)
    made = pictures(count)
    for shard, first in enumerate(range(0, count, 10)):
        path = root / part / f"shard-{shard:06d}.tar"
        with tarfile.open(path, "w") as archive:
            for number in range(first, min(first + 10, count)):
                image, target = made[number]
                buffer = io.BytesIO()
                image.save(buffer, "PNG")
                add(archive, f"{number:04d}.png", buffer.getvalue())
                add(archive, f"{number:04d}.cls", str(target).encode())


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def losses(directory: Path, run: str, **data: Any) -> list[float]:
    tree = {**SETTINGS, "run": {**SETTINGS["run"], "dir": str(directory), "name": run}}
    passed = data.pop("passed", None)
    config = Config.from_dict({**tree, "data": data})
    Trainer(config, **(passed or {})).fit()
    rows = read_rows(directory / run / "metrics.jsonl")
    assert "val/loss" in rows[-1]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def test_tar_shards_by_number(tmp_path: Path) -> None:
    """The same samples as a list of them, so the same run; from loader processes, too."""
    shards = tmp_path / "shards"
    write_shards(shards, "train", 24)
    write_shards(shards, "val", 5)
    made = TarShards(str(shards), train=True)
    for number, (image, target) in enumerate(pictures(24)):
        assert made[number][0].tobytes() == image.tobytes()
        assert made[number][1] == target
    lists: Any = {"train_data": pictures(24), "val_data": pictures(5)}
    expected = losses(tmp_path, "list", passed=lists)

    command = [sys.executable, "-m", "examples.formats.tar_shards"]
    files = map(str, shards.glob("*/*.tar"))
    subprocess.run([*command, *files], check=True, cwd=ROOT)
    assert len(list(shards.glob("*/*.index.npy"))) == 4
    name = "examples.formats.tar_shards.TarShards"
    assert losses(tmp_path, "tar", name=name, root=str(shards), workers=1) == expected
    (shards / "val" / "shard-000000.tar").touch()  # newer than its index
    assert len(TarShards(str(shards), train=False)) == 5


def test_arrow_and_parquet_by_number(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b", "c"])
    )
    for part, count in (("train", 24), ("val", 5)):
        images, labels = zip(*pictures(count), strict=True)
        rows = {"image": list(images), "label": list(labels)}
        data = datasets.Dataset.from_dict(rows, features=features)
        data.save_to_disk(str(tmp_path / "arrow" / part))
        data.to_parquet(str(tmp_path / f"{part}-00000.parquet"))
    lists: Any = {"train_data": pictures(24), "val_data": pictures(5)}
    expected = losses(tmp_path, "list", passed=lists)
    module = "examples.formats.arrow"
    root = str(tmp_path / "arrow")
    assert losses(tmp_path, "disk", name=f"{module}.from_disk", root=root) == expected
    parquet = {"name": f"{module}.from_parquet", "cache_dir": str(tmp_path / "cache")}
    assert losses(tmp_path, "parquet", root=str(tmp_path), **parquet) == expected
