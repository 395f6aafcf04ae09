"""Objects whose state travels in checkpoints: their names, their state on every rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from trainer.core.observers import Stateful
from trainer.errors import ConfigError, LockstepError
from trainer.process.ranks import Ranks
from trainer.storage.digest import digest, hexadecimal


def named_stateful(objects: Mapping[str, object], others: Iterable[object]) -> dict[str, Stateful]:
    """All stateful objects of a run under the names that a checkpoint keeps them by.

    `objects` have names already. Of `others`, those that are stateful are named by their class; a second one of a
    class gets `-2`, and so on. Raises `ConfigError` where an object with a name is not stateful.
    """
    stateful: dict[str, Stateful] = {}
    for name, value in objects.items():
        if not isinstance(value, Stateful):
            kind = type(value).__qualname__
            raise ConfigError(f"stateful.{name}", f"{kind} has no state_dict and load_state_dict; write both")
        stateful[name] = value
    for other in others:
        if isinstance(other, Stateful):
            stateful[_free_name(type(other).__name__, stateful)] = other
    return stateful


def read_states(objects: Mapping[str, Stateful], ranks: Ranks) -> dict[str, dict[str, Any]]:
    """The state of each object. A collective.

    Raises `LockstepError` where the ranks hold different states: only one of them could be kept.
    """
    states = {name: dict(value.state_dict()) for name, value in objects.items()}
    if ranks.count > 1 and states:
        summaries = ranks.gather([{name: _summary(state) for name, state in states.items()}])
        for name in states:
            for rank, summary in enumerate(summaries):
                if summary.get(name) != summaries[0].get(name):
                    raise LockstepError(
                        f"the state of {name} on rank {rank} is not that of rank 0, and a checkpoint keeps one for all "
                        f"ranks; update it from what is the same on every rank: weights, gradients after `gradient`, "
                        f"rows, not a rank's own micro-batches"
                    )
    return states


def load_states(objects: Mapping[str, Stateful], states: Mapping[str, Any]) -> list[str]:
    """Give each object its state back; returns a note for each that a checkpoint or the run lacks."""
    for name in objects.keys() & states.keys():
        objects[name].load_state_dict(states[name])
    notes = []
    for name in sorted(objects.keys() - states.keys()):
        notes.append(f"{name} starts afresh: the checkpoint holds no state of it")
    for name in sorted(states.keys() - objects.keys()):
        notes.append(f"the checkpoint's state of {name} is left out: nothing of that name is in this run")
    return notes


def _free_name(base: str, taken: Mapping[str, object]) -> str:
    name = base
    number = 1
    while name in taken:
        number += 1
        name = f"{base}-{number}"
    return name


def _summary(state: Mapping[str, Any]) -> tuple[str, str]:
    """A digest of the state's tensors, and the text of all else."""
    leaves, structure = tree_flatten(dict(state))
    tensors = {f"{number:08d}": leaf for number, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    others = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
    with torch.no_grad():
        digits = hexadecimal(digest(tensors)) if tensors else ""
    return digits, f"{structure}{others}"
