"""Batches of bytes become what the model sees a part at a time on the CPU: the same bits, with less traffic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2

from trainer.data.normalize import CACHE_BYTES, Normalize

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class LargestPass(TorchDispatchMode):
    """The most bytes that an operation in place has gone over at once."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func._schema.name.endswith("_"):
            self.size = max(self.size, args[0].nbytes)
        return func(*args, **(kwargs or {}))


def images(count: int, height: int, width: int) -> Tensor:
    """uint8 `(count, 3, height, width)`, in which every channel has every value."""
    values = torch.arange(count * 3 * height * width) * 2654435761 >> 7
    return values.to(torch.uint8).view(count, 3, height, width)


def of_whole(batch: Tensor, dtype: torch.dtype) -> Tensor:
    mean, std = (
        torch.tensor(values, dtype=dtype).view(3, 1, 1) for values in (MEAN, STD)
    )
    return (batch.to(dtype) * torch.tensor(1 / 255, dtype=dtype) - mean) / std


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("count", "height", "width"), [(5, 211, 223), (300, 33, 29), (2, 800, 601)]
)
def test_parts_have_the_bits_of_the_whole(
    count: int, height: int, width: int, dtype: torch.dtype, threads: int
) -> None:
    batch = images(count, height, width)
    together = batch.to(memory_format=torch.channels_last)
    expected = of_whole(batch, dtype)
    if dtype != torch.bfloat16:  # torchvision does not round 1/255 to it
        plain = v2.Compose([v2.ToDtype(dtype, scale=True), v2.Normalize(MEAN, STD)])
        assert torch.equal(plain(batch), expected)
    for source, puts_apart, form in (
        (batch, False, torch.contiguous_format),
        (together, True, torch.contiguous_format),
        (together, False, torch.channels_last),
        (batch[:, :, 3:, :-5], False, torch.contiguous_format),
    ):
        normalize = Normalize(MEAN, STD, dtype, puts_channels_apart=puts_apart)
        with LargestPass() as largest:
            result = normalize(source)
        if source.shape == batch.shape:
            assert torch.equal(result, expected)
        else:
            assert torch.equal(result, expected[:, :, 3:, :-5])
        assert result.is_contiguous(memory_format=form)
        of_one = result[0].nbytes
        assert largest.size <= max(CACHE_BYTES * threads, of_one)


def test_bytes_of_a_mean_and_std_of_one_value_and_of_none() -> None:
    batch = images(9, 224, 224)
    scaled = batch.float() * torch.tensor(1 / 255)
    assert torch.equal(Normalize(None, None, torch.float32)(batch), scaled)
    expected = (scaled - 0.5) / torch.tensor(0.3)
    assert torch.equal(Normalize([0.5], [0.3], torch.float32)(batch), expected)


def test_an_exported_program_takes_any_number_of_large_images() -> None:
    normalize = Normalize(MEAN, STD, torch.float32)
    size = {0: torch.export.Dim("batch")}
    program = torch.export.export(
        normalize, (images(2, 300, 310),), dynamic_shapes={"images": size}
    )
    for count in (3, 7):
        batch = images(count, 300, 310)
        assert torch.equal(program.module()(batch), of_whole(batch, torch.float32))
