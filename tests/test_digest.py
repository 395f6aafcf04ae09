"""The digest of weights depends on every bit and its position, and on nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.operations import Operations
from trainer.storage import digest as module
from trainer.storage.digest import digest, hexadecimal

MASK = (1 << 64) - 1


def by_hand(bits: list[int]) -> str:
    """The same arithmetic in Python's integers; shifts keep the sign, as torch's do."""
    total = 0
    for position, value in enumerate(bits, start=1):
        mixed = _signed((_signed(position * module.GOLDEN) ^ value) * module.MIXER)
        total += mixed ^ (mixed >> 32)
    return f"{total & MASK:016x}"


def _signed(value: int) -> int:
    return ((value + (1 << 63)) & MASK) - (1 << 63)


def weights(**more: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "b": torch.randn(7, 3),
        "a": torch.randn(5, dtype=torch.float64),
        "c": torch.randn(4).bfloat16(),
        **more,
    }


def test_it_is_the_arithmetic_it_says(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    tensors = weights()
    views = (
        tensors["a"].view(torch.int64),
        tensors["b"].view(torch.int32).flatten(),
        tensors["c"].view(torch.int16),
    )
    expected = by_hand([bit for view in views for bit in view.tolist()])
    assert hexadecimal(digest(tensors)) == expected
    monkeypatch.setattr(
        module, "CPU_CHUNK", 4
    )  # large tensors cut and small ones joined
    assert hexadecimal(digest(tensors)) == expected


def test_order_of_names_and_strides_do_not_count() -> None:
    tensors = weights()
    reordered = dict(reversed(tensors.items()))
    reordered["b"] = tensors["b"].t().contiguous().t()
    assert digest(reordered) == digest(tensors)


def test_one_bit_and_an_exchange_count() -> None:
    tensors = weights()
    before = digest(tensors)
    tensors["b"].view(torch.int32)[3, 1] ^= 1
    flipped = digest(tensors)
    tensors["b"].view(torch.int32)[3, 1] ^= 1
    tensors["a"][[0, 1]] = tensors["a"][[1, 0]]
    assert len({int(before), int(flipped), int(digest(tensors))}) == 3


def test_a_small_tensor_takes_three_operations() -> None:
    """Every row has a digest: operations on each of many small tensors would take longer than the arithmetic."""

    def operations(tensors: int) -> int:
        weights = {str(number): torch.randn(3, 4) for number in range(tensors)}
        with Operations() as counted:
            digest(weights)
        return counted.counts.total()

    assert operations(9) - operations(1) <= 8 * 3


def test_a_model_without_weights_has_one() -> None:
    assert hexadecimal(digest({})) == "0" * 16
