"""Random numbers for whole batches at once: a hash of integers on int64 tensors, the same on every device.

A draw is a pure function of a key, a sample's id, how often the sample came before in its epoch, and the draw's own
number. So it depends neither on the batch that the sample is in, nor on the process or the device that makes it.

The hash is SplitMix64 (Steele, Lea and Flood, 2014), the tensor form of `trainer.exact.seeding.mix_key`. Integer
products of tensors keep their lowest 64 bits on CPUs and on CUDA; `check_hash` asks the device at hand.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.errors import ConfigError
from trainer.exact.seeding import (
    FIRST_MULTIPLIER,
    MAJOR_STEP,
    MASK,
    MINOR_STEP,
    SECOND_MULTIPLIER,
    key,
    mix_key,
)

BITS = 32  # of a draw
RANGE = 1 << BITS
CHECKED = 67  # more than the widest vector registers hold, and no multiple of them


def signed(value: int) -> int:
    """The int64 with the lowest 64 bits of `value`."""
    value &= MASK
    return value - (1 << 64) if value >> 63 else value


def mix_keys(base: Tensor | int, major: Tensor, minor: Tensor | int) -> Tensor:
    """`mix_key` of every element of int64 tensors that broadcast: the same 64 bits, as signed numbers."""
    base = signed(base) if isinstance(base, int) else base
    x = major * signed(MAJOR_STEP) + base
    if isinstance(minor, Tensor):
        x = x + minor * signed(MINOR_STEP)
    elif minor:
        x = x + signed(minor * MINOR_STEP)
    x = (x ^ _shift_right(x, 30)) * signed(FIRST_MULTIPLIER)
    x = (x ^ _shift_right(x, 27)) * signed(SECOND_MULTIPLIER)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """A shift that fills with zeros; that of a signed number fills with its sign."""
    return (x >> bits) & (MASK >> bits)


class CounterDraws:
    """Draws for several purposes at once: `counts[i]` of them for each sample, keyed by `bases[i]`.

    A base is a key of the seed and the purpose (`trainer.exact.seeding.key`).
    """

    def __init__(
        self, bases: Sequence[int], counts: Sequence[int], device: torch.device
    ) -> None:
        self._counts = list(counts)
        self._bases = torch.tensor([signed(base) for base in bases], device=device)
        # Of each column of draws: its purpose, and its number among those of the purpose.
        purposes: list[int] = []
        numbers: list[int] = []
        for purpose, count in enumerate(counts):
            purposes += [purpose] * count
            numbers += range(count)
        self._purposes = torch.tensor(purposes, dtype=torch.int64, device=device)
        self._numbers = torch.tensor(numbers, dtype=torch.int64, device=device)
        self._of_epoch: tuple[int, Tensor] | None = None  # the last epoch's keys

    def __call__(
        self, epoch: int, ids: Tensor, occurrences: Tensor | None
    ) -> Sequence[Tensor]:
        """Whole numbers from 0 to 2³² − 1, int64 `(B, count)` for each purpose.

        `ids` are int64 `(B,)` on the device, and so are `occurrences`: how often each sample came before in its epoch;
        None: it did not.
        """
        of_epoch = self._keys_of(epoch)
        minor = 0 if occurrences is None else occurrences.unsqueeze(1)
        of_samples = mix_keys(of_epoch, ids.unsqueeze(1), minor)
        keys = of_samples.index_select(1, self._purposes)
        # The upper half: the lowest bits of a product are its weakest.
        draws = _shift_right(mix_keys(keys, self._numbers, 0), 64 - BITS)
        return torch.split(draws, self._counts, 1)

    def _keys_of(self, epoch: int) -> Tensor:
        """A key for each purpose, int64 `(purposes,)`."""
        if self._of_epoch is None or self._of_epoch[0] != epoch:
            position = torch.full_like(self._bases, epoch)
            self._of_epoch = epoch, mix_keys(self._bases, position, 0)
        return self._of_epoch[1]


def below(draws: Tensor, bound: Tensor | int) -> Tensor:
    """Draws as whole numbers from 0 to `bound` − 1, for a bound of up to 2³¹. By a product, without a division."""
    return (draws * bound) >> BITS


def happens(draws: Tensor, probability: float) -> Tensor:
    """True with `probability`, to a part in 2³²."""
    return draws < round(probability * RANGE)


def between(draws: Tensor, low: int, high: int) -> Tensor:
    """Draws as whole numbers from `low` to `high`, both included."""
    return below(draws, high - low + 1) + low


def check_hash(device: torch.device) -> None:
    """Raise `ConfigError` if the device's whole numbers are not those that the hash needs."""
    ids = torch.arange(CHECKED, device=device)
    base = key(0, "check of the hash")
    expected = [signed(mix_key(base, i, i)) for i in range(CHECKED)]
    if mix_keys(base, ids, ids).tolist() != expected:
        raise ConfigError(
            "data.batch_transforms",
            f"needs whole numbers of 64 bits, which {device.type} does not have; use data.train_transforms",
        )
