"""JPEGs a second: decoded by torchvision on the CPU and on the GPU, and as Lockstep loads them from a folder."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from benchmarks.gpu.check import Answer, Setting, Unanswered
from trainer.config.data_section import DataConfig
from trainer.data.datasets import build_datasets
from trainer.data.loading import build_loaders
from trainer.data.requests import whole_requests

QUALITY = 90
HEIGHT, WIDTH = 375, 500  # ImageNet's most frequent
MOST_WORKERS = 16
ROUNDS = 3


def jpeg_decoding(setting: Setting) -> Answer:
    """JPEGs of 500 × 375, made on the fly: images/s of one thread, of all, of the GPU, and of Lockstep's loader."""
    if find_spec("torchvision") is None:
        raise Unanswered("torchvision, which decodes images, is not installed")
    from torchvision.io import decode_jpeg

    files = jpegs(setting.pick(64, 64, 4))
    threads = os.cpu_count() or 1
    paces = {"one thread": _pace(lambda: [decode_jpeg(file) for file in files], files)}
    with ThreadPoolExecutor(threads) as pool:
        many = files * 4
        paces[f"{threads} threads"] = _pace(
            lambda: list(pool.map(decode_jpeg, many)), many
        )
    # Its loader processes are forks, so before the GPU is used.
    workers = min(threads, MOST_WORKERS)
    paces[f"Lockstep with {workers} workers, resized to 224"] = _pace_of_loader(
        setting, files, workers
    )
    note = "; only a GPU can answer for itself"
    if setting.on_gpu:
        batch = files * setting.pick(8, 2, 1)
        try:
            paces["the GPU"] = _pace(lambda: _decode_on(setting.device, batch), batch)
            note = ""
        except RuntimeError as error:
            # A torchvision built without nvJPEG, for one.
            note = f"; the GPU decodes none: {str(error).splitlines()[0]}"
    texts = [f"{pace:,.0f} by {name}" for name, pace in paces.items()]
    return Answer(f"images/s: {', '.join(texts)}{note}", {"images_per_second": paces})


def jpegs(count: int) -> list[Tensor]:
    """Files as bytes. Smooth images with some noise are about as large as photographs."""
    from torchvision.io import encode_jpeg

    small = torch.rand(count, 3, HEIGHT // 8, WIDTH // 8)
    smooth = interpolate(small, (HEIGHT, WIDTH), mode="bicubic")
    noisy = smooth + 0.05 * torch.randn(smooth.shape)
    images = noisy.mul(255).clamp(0, 255).byte()
    return [encode_jpeg(image, QUALITY) for image in images]


def _decode_on(device: torch.device, files: list[Tensor]) -> None:
    from torchvision.io import decode_jpeg

    decode_jpeg(files, device=device)
    torch.cuda.synchronize()


def _pace(action: Callable[[], object], files: list[Tensor]) -> float:
    """Images a second of the fastest of some rounds, after one that does not count."""
    action()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return len(files) / min(times)


def _pace_of_loader(setting: Setting, files: list[Tensor], workers: int) -> float:
    """Images a second of a folder of the files, decoded, cropped and collated by loader processes."""
    copies = setting.pick(40, 10, 4)
    write_folder(setting.directory, files, copies)
    section = DataConfig(
        name="folder",
        root=str(setting.directory),
        workers=workers,
        train_transforms=[{"name": "RandomResizedCrop", "size": 224}],
    )
    data = build_datasets(section, nullcontext)
    loader, _ = build_loaders(
        section, data, seed=0, device=torch.device("cpu"), dtype=torch.float32
    )
    size = setting.pick(64, 64, 4)
    batches = loader.run(whole_requests(len(data.train), size, 0, 1))
    first = next(batches)  # the workers have started
    start = time.perf_counter()
    images = sum(len(batch.inputs) for batch in batches)
    assert images == len(data.train) - len(first.inputs)
    return images / (time.perf_counter() - start)


def write_folder(root: Path, files: list[Tensor], copies: int) -> None:
    for part, count in (("train", copies), ("val", 1)):
        folder = root / part / "images"
        folder.mkdir(parents=True)
        for index, file in enumerate(files * count):
            (folder / f"{index:05}.jpg").write_bytes(file.numpy().tobytes())
