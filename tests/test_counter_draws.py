"""Draws by a hash of integers: against plain Python's, independent of the batch, uniform and uncorrelated."""

from __future__ import annotations

import pytest
import torch

from trainer.exact.counter_draws import (
    RANGE,
    CounterDraws,
    below,
    between,
    check_hash,
    happens,
    mix_keys,
    signed,
)
from trainer.exact.seeding import key, mix_key

CPU = torch.device("cpu")
BASES = [key(0, "first"), key(0, "second")]
LARGEST = 2**63 - 1


def by_python(
    base: int, epoch: int, sample: int, occurrence: int, count: int
) -> list[int]:
    of_sample = mix_key(mix_key(base, epoch, 0), sample, occurrence)
    return [mix_key(of_sample, number, 0) >> 32 for number in range(count)]


def test_draws_are_those_of_plain_python() -> None:
    ids = torch.tensor([0, 1, 5, 2**31, 2**40 + 3, LARGEST])
    occurrences = torch.tensor([0, 0, 1, 2, 3, 4])
    draws = CounterDraws(BASES, [3, 2], CPU)
    for epoch in (0, 1, 999):
        for base, part in zip(BASES, draws(epoch, ids, occurrences), strict=True):
            for row, sample, occurrence in zip(
                part.tolist(), ids.tolist(), occurrences.tolist(), strict=True
            ):
                assert row == by_python(base, epoch, sample, occurrence, len(row))
    check_hash(CPU)


def test_a_draw_depends_on_nothing_but_its_sample() -> None:
    ids = torch.randint(10**6, (257,), generator=torch.Generator().manual_seed(0))
    draws = CounterDraws(BASES, [4, 1], CPU)
    together = draws(3, ids, None)
    for index in range(len(ids)):
        alone = draws(3, ids[index : index + 1], None)
        for whole, part in zip(together, alone, strict=True):
            assert torch.equal(whole[index : index + 1], part)
    # A purpose of its own draws apart: what is added beside it changes nothing.
    assert torch.equal(CounterDraws(BASES[:1], [4], CPU)(3, ids, None)[0], together[0])


def test_signed_numbers_hold_the_same_bits() -> None:
    for value in (0, 1, LARGEST, LARGEST + 1, 2**64 - 1, 2**64, -1):
        assert signed(value) & (2**64 - 1) == value & (2**64 - 1)
        assert -(2**63) <= signed(value) <= LARGEST
    one = torch.tensor([1])
    assert mix_keys(2**64 - 1, one, 7).item() == signed(mix_key(2**64 - 1, 1, 7))


def samples_of(epoch: int, count: int = 100_000) -> torch.Tensor:
    """`(count, 2)` draws of neighbouring ids, in [0, 1)."""
    draws = CounterDraws(BASES[:1], [2], CPU)(epoch, torch.arange(count), None)[0]
    return draws.double() / RANGE


def test_neighbouring_samples_epochs_and_numbers_draw_evenly_and_apart() -> None:
    now, later = samples_of(0), samples_of(1)
    for draws in (now, later):
        counts = torch.histc(draws[:, 0], 100, 0, 1)
        # χ² of 99 degrees of freedom: 1 in 10⁶ is above 178.
        assert ((counts - 1000) ** 2 / 1000).sum() < 178
    pairs = {
        "numbers": (now[:, 0], now[:, 1]),
        "epochs": (now[:, 0], later[:, 0]),
        "samples": (now[:-1, 0], now[1:, 0]),
    }
    for name, pair in pairs.items():
        correlation = torch.corrcoef(torch.stack(pair))[0, 1]
        assert abs(correlation) < 0.016, name  # five standard deviations


@pytest.mark.parametrize("bound", [1, 2, 9, 1000, 2**20])
def test_whole_numbers_below_a_bound(bound: int) -> None:
    draws = torch.tensor([0, RANGE // 2, RANGE - 1])
    assert below(draws, bound).tolist() == [0, bound // 2, bound - 1]
    assert between(draws, 3, 2 + bound).tolist() == [3, 3 + bound // 2, 2 + bound]


def test_an_event_happens_with_its_probability() -> None:
    draws = CounterDraws(BASES[:1], [1], CPU)(0, torch.arange(100_000), None)[0]
    for probability in (0.1, 0.5, 0.9):
        assert abs(happens(draws, probability).double().mean() - probability) < 0.008
    assert not happens(draws, 0.0).any()
    assert happens(draws, 1.0).all()
