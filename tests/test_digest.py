"""The digest of weights: of every bit, of where it stands, and of nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.storage import digest as module
from trainer.storage.digest import digest, hexadecimal

MASK = (1 << 64) - 1


def by_hand(bits: list[int]) -> str:
    """The same arithmetic in Python's integers; shifts keep the sign, as torch's do."""
    total = 0
    for place, value in enumerate(bits, start=1):
        mixed = _signed((_signed(place * module.GOLDEN) ^ value) * module.MIXER)
        total += mixed ^ (mixed >> 32)
    return f"{total & MASK:016x}"


def _signed(value: int) -> int:
    return ((value + (1 << 63)) & MASK) - (1 << 63)


def weights(**more: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"b": torch.randn(7, 3), "a": torch.randn(5, dtype=torch.float64), "c": torch.randn(4).bfloat16(), **more}


def test_it_is_the_arithmetic_it_says(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    kept = weights()
    views = (kept["a"].view(torch.int64), kept["b"].view(torch.int32).flatten(), kept["c"].view(torch.int16))
    expected = by_hand([bit for view in views for bit in view.tolist()])
    assert hexadecimal(digest(kept)) == expected
    monkeypatch.setattr(module, "CHUNK", 4)  # large tensors cut and small ones joined
    assert hexadecimal(digest(kept)) == expected


def test_order_of_names_and_strides_do_not_count() -> None:
    kept = weights()
    turned = dict(reversed(kept.items()))
    turned["b"] = kept["b"].t().contiguous().t()
    assert digest(turned) == digest(kept)


def test_one_bit_and_an_exchange_count() -> None:
    kept = weights()
    before = digest(kept)
    kept["b"].view(torch.int32)[3, 1] ^= 1
    flipped = digest(kept)
    kept["b"].view(torch.int32)[3, 1] ^= 1
    kept["a"][[0, 1]] = kept["a"][[1, 0]]
    assert len({int(before), int(flipped), int(digest(kept))}) == 3


def test_a_model_without_weights_has_one() -> None:
    assert hexadecimal(digest({})) == "0" * 16
