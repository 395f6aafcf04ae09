"""Resizing in whole numbers: image by image, as large ones are on the CPU, gives what a whole batch gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.data.batch_transforms import bilinear
from trainer.data.batch_transforms.resizing import RandomResizedCrop, Resize
from trainer.exact.counter_draws import RANGE

COUNT = 12
BITS = bilinear.WEIGHT_BITS


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def noise(*shape: int, seed: int = 0) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=draws)


def resized_rows(image: np.ndarray, top: int, height: int, size: int) -> np.ndarray:
    """Rows of an image `(C, H, W)` by the formula, in Python's whole numbers."""
    rows = []
    for row in range(size):
        shares = []
        for place in range(height):
            distance = abs((2 * place + 1) * size - (2 * row + 1) * height)
            shares.append(max(0, 2 * max(height, size) - distance))
        total = np.full(image[:, 0].shape, 1 << (BITS - 1))
        for place, share in enumerate(shares):
            weight = ((share << BITS) + sum(shares) // 2) // sum(shares)
            total += weight * image[:, top + place].astype(np.int64)
        rows.append(total >> BITS)
    return np.stack(rows, 1)


@pytest.mark.parametrize("limit", [0, 10**9], ids=["one by one", "whole"])
def test_parts_are_resized_by_the_formula(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bilinear, "LARGE", limit)
    batch = noise(5, 2, 40, 31)
    # Enlarged, made smaller, of one pixel, of a whole side.
    boxes = [(3, 1, 7, 5), (0, 0, 40, 31), (39, 30, 1, 1), (2, 0, 37, 9), (5, 4, 11, 8)]
    box = torch.tensor(boxes).unbind(1)
    result = bilinear.resize(batch, box, (11, 8)).numpy()
    for image, mine, (top, left, height, width) in zip(
        batch.numpy(), result, boxes, strict=True
    ):
        rows = resized_rows(image, top, height, 11).transpose(0, 2, 1)
        expected = resized_rows(rows, left, width, 8).transpose(0, 2, 1)
        assert np.array_equal(mine, expected)


class Calls(TorchDispatchMode):
    """Counts the operations of torch and the values that they make."""

    count = values = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        self.count += 1
        self.values += result.numel() if isinstance(result, Tensor) else 0
        return result


@pytest.mark.parametrize(("height", "width"), [(1, 9000), (9000, 1), (1, 1)])
def test_a_line_of_pixels_is_no_work(height: int, width: int) -> None:
    image, size = noise(3, height, width), (24, 20)
    with Calls() as calls:
        result = Resize(list(size)).of_several_sizes([image], torch.zeros(1, 0))
    assert calls.count < 200 and calls.values < 100 * image.numel() + 10**6
    rows = resized_rows(image.numpy(), 0, height, size[0]).transpose(0, 2, 1)
    expected = resized_rows(rows, 0, width, size[1]).transpose(0, 2, 1)
    assert np.array_equal(result[0].numpy(), expected)


@pytest.mark.parametrize("several", [False, True], ids=["one size", "several sizes"])
@pytest.mark.parametrize(
    "transform", [RandomResizedCrop(90), RandomResizedCrop([70, 110]), Resize([90, 80])]
)
def test_a_large_image_is_resized_by_itself_with_the_bits_of_the_batch(
    transform: RandomResizedCrop | Resize,
    several: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = torch.Generator().manual_seed(1)
    draws = torch.randint(0, RANGE, (COUNT, transform.draws), generator=source)
    sides = [(133, 97)] * COUNT
    if several:
        sides = [(40 + 19 * index, 260 - 17 * index) for index in range(COUNT)]
    images = [noise(3, *side, seed=index) for index, side in enumerate(sides)]

    def change() -> Tensor:
        if several:
            return transform.of_several_sizes(images, draws)
        return transform(torch.stack(images), draws)

    parts = []
    of_one = bilinear._Taps.of_one

    def count(taps: bilinear._Taps, part: Tensor, index: int, height: int) -> Tensor:
        parts.append(part.numel())
        return of_one(taps, part, index, height)

    monkeypatch.setattr(bilinear._Taps, "of_one", count)
    alone = change()
    assert len(parts) == 2 * COUNT
    monkeypatch.setattr(bilinear, "LARGE", 10**9)
    together = change()
    assert len(parts) == 2 * COUNT, "the second was made whole"
    assert torch.equal(alone, together)
    assert alone.is_contiguous() and together.is_contiguous()
