"""Objects whose state is saved in checkpoints: their names there, and the same state on every rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from trainer.core.observers import Stateful
from trainer.errors import ConfigError, LockstepError
from trainer.process.ranks import Ranks
from trainer.storage.checkpoint import FURTHER
from trainer.storage.digest import digest, hexadecimal
from trainer.storage.stateful import check_name

StateDigest = tuple[str, str]  # of its tensors; and everything else, as text


class StatefulObjects:
    """A run's stateful objects, each under the name of its files in a checkpoint.

    An object has one name, however often it is added. Each method raises `ConfigError` for a name that is in use
    already or cannot name a file.
    """

    def __init__(self) -> None:
        self.by_name: dict[str, Stateful] = {}

    def add_named(self, objects: Mapping[str, object]) -> None:
        """Add `objects` under their keys. Each must be stateful."""
        for name, value in objects.items():
            if not is_stateful(value):
                kind = (
                    f"{value.__name__} is a class"
                    if isinstance(value, type)
                    else type(value).__qualname__
                )
                raise ConfigError(
                    f"stateful.{name}",
                    f"{kind} has no state_dict and load_state_dict; write both",
                )
            self._add(name, value)

    def add_attributes(
        self, attributes: Mapping[str, object], *, model: nn.Module
    ) -> None:
        """Add those that are stateful under their names, without leading underscores, and are no part of `model`."""
        model_parts = {id(part) for part in model.modules()}
        for name, value in attributes.items():
            if is_stateful(value) and id(value) not in model_parts:
                self._add(name.lstrip("_"), value)

    def add_observers(self, observers: Iterable[object]) -> None:
        """Add those that are stateful under the names of their classes; the second of a class has `-2` added."""
        counts: Counter[str] = Counter()
        for observer in observers:
            if not is_stateful(observer) or self._has(observer):
                continue
            kind = type(observer).__name__
            counts[kind] += 1
            number = counts[kind]
            self._add(kind if number == 1 else f"{kind}-{number}", observer)

    def _has(self, value: object) -> bool:
        return any(value is other for other in self.by_name.values())

    def _add(self, name: str, value: Stateful) -> None:
        if self._has(value):
            return
        try:
            check_name(name)
        except LockstepError as error:
            raise ConfigError("stateful", str(error)) from None
        if name.lower() == FURTHER:
            raise ConfigError(
                f"stateful.{name}",
                "names what a checkpoint keeps of the loss and the like; choose another name",
            )
        for other in self.by_name:
            # Some file systems take both for one name.
            if other.lower() == name.lower():
                raise ConfigError(
                    f"stateful.{name}",
                    f"a checkpoint keeps the state of a {type(self.by_name[other]).__qualname__} under this name "
                    f"({other}), so that of a {type(value).__qualname__} needs another; pass it in `stateful` under a "
                    f"name of its own",
                )
        self.by_name[name] = value


def is_stateful(value: object) -> TypeGuard[Stateful]:
    """True for an object with `state_dict` and `load_state_dict`; a class has them, but no state."""
    return isinstance(value, Stateful) and not isinstance(value, type)


def keeps_statistics(objects: Mapping[str, Stateful]) -> bool:
    """True if the state of one holds running statistics, as that of an averaged model does: it copies the model's."""
    return any(_has_statistics(value.state_dict()) for value in objects.values())


def _has_statistics(state: Any) -> bool:
    if not isinstance(state, Mapping):
        return False
    for name, value in state.items():
        if str(name).rpartition(".")[2] in ("running_mean", "running_var"):
            return True
        if _has_statistics(value):
            return True
    return False


def read_states(
    objects: Mapping[str, Stateful], ranks: Ranks
) -> dict[str, dict[str, Any]]:
    """The state of each object. A collective.

    Raises `LockstepError` where the ranks hold different states: a checkpoint keeps one for all of them.
    """
    states = {}
    for name, value in objects.items():
        states[name] = dict(value.state_dict())
    if ranks.count > 1 and states:
        _check_same_on_every_rank(states, ranks)
    return states


def load_states(
    objects: Mapping[str, Stateful], states: Mapping[str, Any]
) -> list[str]:
    """Give each object its state back; returns a note for each state that the checkpoint or the run lacks."""
    for name in objects.keys() & states.keys():
        objects[name].load_state_dict(states[name])
    notes = []
    for name in sorted(objects.keys() - states.keys()):
        notes.append(f"{name} starts afresh: the checkpoint holds no state of it")
    for name in sorted(states.keys() - objects.keys()):
        notes.append(
            f"the checkpoint's state of {name} is left out: nothing of that name is in this run"
        )
    return notes


def _check_same_on_every_rank(
    states: Mapping[str, Mapping[str, Any]], ranks: Ranks
) -> None:
    digests = {}
    for name, state in states.items():
        digests[name] = _digest(state)
    first, *others = ranks.gather([digests])
    for rank, other in enumerate(others, start=1):
        for name in states:
            if other.get(name) != first.get(name):
                raise LockstepError(
                    f"the state of {name} on rank {rank} is not that of rank 0, and a checkpoint keeps one for all "
                    f"ranks; update it from what is the same on every rank: weights, gradients after `gradient`, "
                    f"rows, not a rank's own micro-batches"
                )


@torch.no_grad()
def _digest(state: Mapping[str, Any]) -> StateDigest:
    values, structure = tree_flatten(dict(state))
    tensors = {}
    others = []
    for number, value in enumerate(values):
        if isinstance(value, Tensor):
            tensors[f"{number:08d}"] = value
        else:
            others.append(value)
    of_tensors = hexadecimal(digest(tensors)) if tensors else ""
    return of_tensors, f"{structure}{others}"
