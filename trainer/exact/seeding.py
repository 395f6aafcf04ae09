"""Keys → random numbers. Every random draw of a run has a key: what it is for, and where in the run it falls.

Nothing is drawn from a stream that runs on from step to step, so nothing random needs saving, and a draw does
not depend on who makes it or on what was drawn before.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b

import numpy as np
import torch

MASK = (1 << 64) - 1


def key(seed: int, purpose: str, *position: int) -> int:
    """A 64-bit key, the BLAKE2b digest (RFC 7693) of the seed, a purpose and a position in the run."""
    text = f"{seed}/{purpose}/{'/'.join(map(str, position))}"
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def mixed(base: int, major: int, minor: int) -> int:
    """A 64-bit key for a place in the run within `base`. For the hot loop, where hashing would cost too much.

    SplitMix64's finalizer (Steele, Lea and Flood, 2014) over two Weyl sequences of odd steps.
    """
    x = (base + major * 0x9E3779B97F4A7C15 + minor * 0xD1B54A32D192ED03) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def numpy_generator(seed: int, purpose: str, *position: int) -> np.random.Generator:
    """A counter-based generator (Philox; Salmon et al., 2011) of its own for one key."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, *position)))


def seed_cpu(value: int) -> None:
    """Seed the three generators that data pipelines draw from: torch's on the CPU, `random`, and NumPy's."""
    torch.default_generator.manual_seed(value)  # torch.manual_seed visits every back end: 100 times the cost
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)


def device_seeder(device: torch.device) -> Callable[[int], object]:
    """What seeds the generators that a model on `device` draws from: the device's, and the host's.

    Dropout draws on the device. A layer drop that calls `torch.rand(1)` draws on the host.
    """
    if device.type == "cpu":
        return torch.default_generator.manual_seed
    if device.type != "cuda":
        return torch.manual_seed
    of_device = device_generator(device)

    def seed_both(value: int) -> None:
        torch.default_generator.manual_seed(value)
        of_device.manual_seed(value)

    return seed_both


def device_generator(device: torch.device) -> torch.Generator:
    """The generator that a model's dropout on `device`, a CPU or a CUDA device, draws from."""
    if device.type == "cpu":
        return torch.default_generator
    index = torch.cuda.current_device() if device.index is None else device.index
    generator: torch.Generator = torch.cuda.default_generators[index]
    return generator


@contextmanager
def preserved_cpu_generators() -> Iterator[None]:
    """Leave the three CPU generators as they were found."""
    saved = torch.default_generator.get_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.default_generator.set_state(saved[0])
        random.setstate(saved[1])
        np.random.set_state(saved[2])


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Leave the three CPU generators, and that of a CUDA device in use, as they were found."""
    cuda_state = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    with preserved_cpu_generators():
        try:
            yield
        finally:
            if cuda_state is not None:
                torch.cuda.set_rng_state(cuda_state)
