"""`data.decode=device`: nvJPEG's pixels beside libjpeg's, and images a second of a folder with it and without."""

from __future__ import annotations

import io
import os
import time
from contextlib import nullcontext, suppress
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.gpu.check import ON_GPU_ONLY, Answer, Setting, Unanswered
from benchmarks.gpu.images import MOST_WORKERS, jpegs, write_folder
from trainer.config.data_section import DataConfig
from trainer.data.datasets import build_datasets
from trainer.data.decoders import COLOR, decoder
from trainer.data.device_decoders import file_decoder
from trainer.data.loading import build_loaders
from trainer.data.requests import whole_requests
from trainer.errors import ConfigError

# Of 255 levels. libjpeg and nvJPEG round differently, and one of them may smooth colours that were sampled sparsely.
MEAN_DISTANCE = 3.0
CROP: list[dict[str, Any]] = [
    {"name": "RandomResizedCrop", "size": 224},
    {"name": "RandomHorizontalFlip"},
]


def pixels(setting: Setting) -> Answer:
    """Files of several sizes and samplings: near the CPU's pixels, and each the same alone as among others."""
    files = _files(setting.pick(32, 16, 4))
    decode_here = decoder("JPEG", COLOR)
    if decode_here is None:
        raise Unanswered("neither TorchCodec nor torchvision decodes JPEG files here")
    expected = [decode_here(file) for file in files]
    if not setting.on_gpu:
        raise Unanswered(ON_GPU_ONLY)
    try:
        found = file_decoder(setting.device)
    except ConfigError as error:
        raise Unanswered(str(error)) from error
    alone = {}
    for index, file in enumerate(files):
        with suppress(RuntimeError):  # a file that it refuses is decoded by the CPU
            alone[index] = found.decode([file])[0]
    together = found.decode([files[index] for index in alone])
    differing = 0
    distances = []
    for (index, image), among_others in zip(alone.items(), together, strict=True):
        differing += not torch.equal(image, among_others)
        distances.append((image.cpu().int() - expected[index].int()).abs().float())
    mean = max(float(distance.mean()) for distance in distances)
    largest = max(float(distance.max()) for distance in distances)
    text = (
        f"{found.name}: {differing} of {len(alone)} images differ alone, {len(files) - len(alone)} are refused; from "
        f"libjpeg's by {mean:.2f} levels on average in the worst image, {largest:.0f} at most"
    )
    values = {
        "differing_alone": differing,
        "refused": len(files) - len(alone),
        "mean": mean,
        "largest": largest,
    }
    return Answer(text, values, differing == 0 and mean <= MEAN_DISTANCE)


def pace(setting: Setting) -> Answer:
    """Images/s of a folder of 500 × 375, cropped to 224 on the device, decoded there and by loader processes."""
    files = jpegs(setting.pick(64, 64, 4))
    write_folder(setting.directory, files, setting.pick(40, 10, 2))
    workers = min(os.cpu_count() or 1, MOST_WORKERS)
    if not setting.on_gpu:
        _pace(setting, "cpu", 1)
        raise Unanswered(ON_GPU_ONLY)
    paces = {f"the CPU, {workers} workers": _pace(setting, "cpu", workers)}
    for count in (2, workers):
        try:
            paces[f"the GPU, {count} workers"] = _pace(setting, "device", count)
        except ConfigError as error:
            raise Unanswered(str(error)) from error
    texts = [f"{pace:,.0f} decoded by {name}" for name, pace in paces.items()]
    return Answer(f"images/s: {', '.join(texts)}", {"images_per_second": paces})


def _files(count: int) -> list[Tensor]:
    """JPEG files, smooth with some noise, of several sizes and samplings of colour."""
    draws = np.random.default_rng(0)
    files = []
    for index in range(count):
        height, width = 90 + 17 * index % 200, 80 + 29 * index % 300
        small = draws.integers(0, 256, (height // 8, width // 8, 3)).astype(np.uint8)
        image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        image.save(
            file, "JPEG", quality=90, subsampling=index % 3, progressive=index % 4 == 3
        )
        files.append(torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8))
    return files


def _pace(setting: Setting, decode: str, workers: int) -> float:
    section = DataConfig(
        name="folder",
        root=str(setting.directory),
        workers=workers,
        decode=decode,  # type: ignore[arg-type]
        batch_transforms=CROP,
    )
    data = build_datasets(section, nullcontext)
    loader, _ = build_loaders(
        section, data, seed=0, device=setting.device, dtype=torch.float32
    )
    size = setting.pick(64, 64, 4)
    batches = loader.run(whole_requests(len(data.train), size, 0, 1))
    first = next(batches)  # the workers have started
    start = time.perf_counter()
    images = sum(len(batch.inputs) for batch in batches)
    if setting.on_gpu:
        torch.cuda.synchronize()
    assert images == len(data.train) - len(first.inputs)
    return images / (time.perf_counter() - start)
