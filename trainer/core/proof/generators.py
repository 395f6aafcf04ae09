"""Random generators that somebody's object keeps for itself: found, named, and put back."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

KINDS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
OBJECTS = 20_000  # looked at, at most
# A longer list holds samples rather than the parts of a pipeline.
LONGEST_LIST = 256
DEPTH = 12  # of objects within each other
LEAVES = (str, bytes, int, float, complex, type, Tensor, np.ndarray, type(None))


def generators_in(root: object) -> dict[str, Any]:
    """The generators that `root` and the objects within it keep, by the path to each: `transforms[2].rng`."""
    found: dict[str, Any] = {}
    seen: set[int] = set()
    queue: list[tuple[str, Any, int]] = [("", root, 0)]
    while queue and len(seen) < OBJECTS:
        path, value, depth = queue.pop()
        if isinstance(value, LEAVES) or id(value) in seen or depth > DEPTH:
            continue
        seen.add(id(value))
        if isinstance(value, KINDS):
            found[path] = value
            continue
        try:
            parts = _parts(value)
        except Exception:
            continue  # other people's objects may raise anything when they are looked at
        for name, part in parts:
            queue.append(((path + name).removeprefix("."), part, depth + 1))
    return found


def _parts(value: Any) -> list[tuple[str, Any]]:
    """What is within an object, with how it is reached from there."""
    if isinstance(value, Mapping):
        if len(value) > LONGEST_LIST:
            return []
        return [(f"[{key!r}]", item) for key, item in value.items()]
    if isinstance(value, list | tuple | set | frozenset):
        if len(value) > LONGEST_LIST:
            return []
        return [(f"[{index}]", item) for index, item in enumerate(value)]
    if callable(value) and hasattr(value, "__closure__"):
        cells = value.__closure__ or ()
        names = value.__code__.co_freevars
        captured = []
        for name, cell in zip(names, cells, strict=True):
            captured.append((f".{name}", _cell(cell)))
        return captured
    attributes = getattr(value, "__dict__", None)
    if not isinstance(attributes, dict) or type(value).__name__ == "module":
        return []
    return [(f".{name}", item) for name, item in attributes.items()]


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def describe(generators: Mapping[str, Any]) -> str:
    """The paths of generators, with their kinds: `rng, a numpy Generator`."""
    parts = []
    for path, generator in list(generators.items())[:3]:
        kind = type(generator)
        package = kind.__module__.partition(".")[0]
        parts.append(f"{path} ({package}'s {kind.__name__})")
    return ", ".join(parts)


@contextmanager
def preserved(generators: Iterable[Any]) -> Iterator[None]:
    """Put the states of `generators` back at the end."""
    states = [(generator, _state(generator)) for generator in generators]
    try:
        yield
    finally:
        for generator, state in states:
            _set_state(generator, state)


@contextmanager
def preserved_in(*roots: object) -> Iterator[None]:
    """Put the states of the generators that some objects keep for themselves back at the end."""
    generators: list[Any] = []
    for root in roots:
        generators += generators_in(root).values()
    with preserved(generators):
        yield


def _state(generator: Any) -> Any:
    match generator:
        case torch.Generator() | np.random.RandomState():
            return generator.get_state()
        case np.random.Generator():
            return generator.bit_generator.state
        case random.Random():
            try:
                return generator.getstate()
            except NotImplementedError:  # `random.SystemRandom` has none
                return None


def _set_state(generator: Any, state: Any) -> None:
    match generator:
        case torch.Generator() | np.random.RandomState():
            generator.set_state(state)
        case np.random.Generator():
            generator.bit_generator.state = state
        case random.Random():
            if state is not None:
                generator.setstate(state)
