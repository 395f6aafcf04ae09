"""Batch transforms on the GPU: the CPU's pixels, and how many images a second."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.check import ON_GPU_ONLY, Answer, Setting, Unanswered
from trainer.data.batch_transforms.base import BatchTransforms
from trainer.data.batch_transforms.build import build_batch_transforms
from trainer.data.batches import Source

ROUNDS = 20
CROP_AND_FLIP: list[dict[str, Any]] = [
    {"name": "RandomCrop", "size": 32, "padding": 4},
    {"name": "RandomHorizontalFlip"},
]
# Every one that computes pixels.
ALL: list[dict[str, Any]] = [
    *CROP_AND_FLIP,
    {"name": "RandomVerticalFlip"},
    {"name": "RandomCrop", "size": 32, "padding": 4, "padding_mode": "reflect"},
    {
        "name": "ColorJitter",
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.4,
        "hue": 0.1,
    },
    {"name": "RandomGrayscale"},
    {"name": "RandomErasing"},
    {"name": "RandomResizedCrop", "size": 24},
]
RESIZED: list[dict[str, Any]] = [
    {"name": "RandomResizedCrop", "size": 224},
    {"name": "RandomHorizontalFlip"},
]


def same_pixels(setting: Setting) -> Answer:
    """All batch transforms, one after the other, on this device and on the CPU: the same bytes."""
    images = _images(setting.pick(512, 256, 32), 32)
    there = _transforms(ALL, setting.device)(*_batch(images, setting.device))
    here = _transforms(ALL, torch.device("cpu"))(*_batch(images, torch.device("cpu")))
    differing = int((there.cpu() != here).sum())
    text = (
        f"{differing:,} of {here.numel():,} pixels differ after {len(ALL)} transforms"
    )
    return Answer(text, {"differing": differing}, differing == 0)


def pace(setting: Setting) -> Answer:
    """Images/s of a crop and a flip of 32 × 32 pixels, and of a resized crop of 256 × 256."""
    if not setting.on_gpu:
        for items, side in ((CROP_AND_FLIP, 32), (RESIZED, 256)):
            _transforms(items, setting.device)(
                *_batch(_images(2, side), setting.device)
            )
        raise Unanswered(ON_GPU_ONLY)
    paces = {
        "crop and flip of 32 × 32": _pace(CROP_AND_FLIP, setting, 512, 32),
        "resized crop of 256 × 256": _pace(RESIZED, setting, 128, 256),
    }
    texts = [f"{pace:,.0f} by {name}" for name, pace in paces.items()]
    return Answer(f"images/s: {', '.join(texts)}", {"images_per_second": paces})


def _images(count: int, side: int) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    shape = (count, 3, side, side)
    return torch.randint(256, shape, generator=draw).to(torch.uint8)


def _transforms(items: list[dict[str, Any]], device: torch.device) -> BatchTransforms:
    built = build_batch_transforms(items, seed=0, purpose="train", device=device)
    assert built is not None
    return built


def _batch(images: Tensor, device: torch.device) -> tuple[Tensor, Source]:
    ids = torch.arange(len(images), device=device)
    return images.to(device), Source(0, ids)


def _pace(
    items: list[dict[str, Any]], setting: Setting, count: int, side: int
) -> float:
    """Images a second, after one round that does not count."""
    transforms = _transforms(items, setting.device)
    batch, source = _batch(_images(count, side), setting.device)
    transforms(batch, source)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for epoch in range(ROUNDS):
        transforms(batch, source._replace(epoch=epoch))
    torch.cuda.synchronize()
    return ROUNDS * count / (time.perf_counter() - start)
