"""Random numbers by key. Every random draw of a run has a key: its purpose, and its position in the run.

No random stream runs on from step to step, so there is no random state to save, and a draw depends neither on the
process that makes it nor on earlier draws.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from trainer.process.device import default_generator, generators_in_use

MASK = (1 << 64) - 1  # keeps 64 bits of a Python integer

# SplitMix64's constants; the second step is another odd number, so that the two sequences differ.
MAJOR_STEP = 0x9E3779B97F4A7C15
MINOR_STEP = 0xD1B54A32D192ED03
FIRST_MULTIPLIER = 0xBF58476D1CE4E5B9
SECOND_MULTIPLIER = 0x94D049BB133111EB


def key(seed: int, purpose: str, *position: int) -> int:
    """A 64-bit key, the BLAKE2b digest (RFC 7693) of the seed, a purpose and a position in the run."""
    path = "/".join(map(str, position))
    digest = blake2b(f"{seed}/{purpose}/{path}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def mix_key(base: int, major: int, minor: int) -> int:
    """A 64-bit key for the position (major, minor) within the key `base`. For the hot loop, where hashing is too slow.

    SplitMix64's finalizer (Steele, Lea and Flood, 2014) over two Weyl sequences of odd steps.
    """
    x = (base + major * MAJOR_STEP + minor * MINOR_STEP) & MASK
    x = ((x ^ (x >> 30)) * FIRST_MULTIPLIER) & MASK
    x = ((x ^ (x >> 27)) * SECOND_MULTIPLIER) & MASK
    return x ^ (x >> 31)


def numpy_generator(seed: int, purpose: str, *position: int) -> np.random.Generator:
    """A counter-based generator (Philox; Salmon et al., 2011) of its own for one key."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, *position)))


def seed_cpu(value: int) -> None:
    """Seed the three generators that data pipelines draw from: torch's on the CPU, `random`, and NumPy's."""
    seed_torch(value)
    seed_host_generators(value)


def seed_torch(value: int) -> None:
    """Seed torch's generator on the CPU."""
    # torch.manual_seed visits every back end: 100 times the cost.
    torch.default_generator.manual_seed(value)


def seed_host_generators(value: int) -> None:
    """Seed `random` and NumPy's global generator."""
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)


def device_seeder(device: torch.device) -> Callable[[int], object]:
    """A function that seeds the generators from which a model on `device` draws: the device's and the host's.

    Dropout draws on the device. A layer drop that calls `torch.rand(1)` draws on the host. For one that calls
    `random.random()` see `trainer.exact.host_draws`.
    """
    if device.type == "cpu":
        return torch.default_generator.manual_seed
    of_device = default_generator(device)
    if of_device is None:
        return torch.manual_seed

    def seed_both(value: int) -> None:
        torch.default_generator.manual_seed(value)
        of_device.manual_seed(value)

    return seed_both


def device_generator(device: torch.device) -> torch.Generator:
    """The generator from which a model's dropout on `device` draws. Raises `ValueError` for an unknown kind."""
    generator = default_generator(device)
    if generator is None:
        raise ValueError(f"the generator of {device.type} is not known")
    return generator


def host_state() -> tuple[Any, ...]:
    """The states of the three CPU generators, to be compared: equal states say that nothing was drawn between."""
    name, keys, position, *gauss = np.random.get_state()
    return (
        torch.default_generator.get_state().numpy().tobytes(),
        random.getstate(),
        (name, np.asarray(keys).tobytes(), position, *gauss),
    )


def draw_state(device: torch.device) -> tuple[Any, ...]:
    """The same with the state of the generator from which a model on `device` draws."""
    generator = None if device.type == "cpu" else default_generator(device)
    if generator is None:
        return host_state()
    return (*host_state(), generator.get_state().numpy().tobytes())


@contextmanager
def keyed_draws(value: int, device: torch.device) -> Iterator[None]:
    """A context in which all draws on the host and on `device` follow from `value`; the generators come back."""
    with preserved_generators():
        seed_cpu(value)
        device_seeder(device)(value)
        yield


@contextmanager
def preserved_cpu_generators() -> Iterator[None]:
    """Put the three CPU generators back at the end."""
    torch_state = torch.default_generator.get_state()
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    try:
        yield
    finally:
        torch.default_generator.set_state(torch_state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def preserved_torch_generator() -> Iterator[None]:
    """Put torch's generator on the CPU back at the end: a tenth of the time of all three."""
    state = torch.default_generator.get_state()
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Put the three CPU generators, and that of a GPU in use, back at the end."""
    states = [(generator, generator.get_state()) for generator in generators_in_use()]
    with preserved_cpu_generators():
        try:
            yield
        finally:
            for generator, state in states:
                generator.set_state(state)
