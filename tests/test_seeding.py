"""Keys are a function of seed, purpose and position, and each position has its own."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from trainer.exact.seeding import (
    device_seeder,
    key,
    mix_key,
    numpy_generator,
    preserved_cpu_generators,
    seed_cpu,
)


def test_keys_are_fixed_for_ever() -> None:
    """A changed key would change every run there is, so two are on record."""
    assert key(0, "order", 0) == 0x6057847D6CE3C932
    assert mix_key(0, 1, 0) == 0xE220A8397B1DCDAF


@pytest.mark.fresh_process  # Python's hash seed is chosen when the interpreter starts
def test_keys_do_not_depend_on_the_process() -> None:
    code = "from trainer.exact.seeding import key; print(key(3, 'train', 4, 5))"
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert printed == {f"{key(3, 'train', 4, 5)}\n"}


def test_each_position_has_a_key_of_its_own() -> None:
    keys = [
        key(seed, purpose, i, j)
        for seed in (0, 1)
        for purpose in ("train", "val")
        for i in range(30)
        for j in range(30)
    ]
    assert len(set(keys)) == len(keys)
    mixed_keys = [
        mix_key(key(0, "device"), step, index)
        for step in range(300)
        for index in range(30)
    ]
    assert (
        len(set(mixed_keys))
        == len({k & 0xFFFFFFFF for k in mixed_keys})
        == len(mixed_keys)
    )
    bits = np.array([[k >> b & 1 for b in range(64)] for k in mixed_keys]).mean(0)
    assert (abs(bits - 0.5) < 0.03).all()


def draws() -> list[float]:
    return [torch.rand(()).item(), random.random(), float(np.random.rand())]


def test_seeding_decides_all_three_generators_and_leaves_no_trace() -> None:
    before = draws() and (torch.get_rng_state(), random.getstate())
    with preserved_cpu_generators():
        seed_cpu(5)
        first = draws()
        draws()
        seed_cpu(5)
        assert draws() == first
        seed_cpu(6)
        assert all(a != b for a, b in zip(draws(), first, strict=True))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


def test_dropout_is_the_keys() -> None:
    def mask(value: int) -> torch.Tensor:
        device_seeder(torch.device("cpu"))(value)
        return torch.nn.functional.dropout(torch.ones(1000))

    assert torch.equal(mask(1), mask(1))
    assert not torch.equal(mask(1), mask(2))


def test_orders() -> None:
    assert (
        numpy_generator(1, "order", 2).permutation(99)
        == numpy_generator(1, "order", 2).permutation(99)
    ).all()
