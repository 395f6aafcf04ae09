"""What is not trained, and from which epoch on it is.

A frozen parameter requires no gradient: a backbone that is frozen whole builds no graph. A frozen module is in eval
mode and stays there whatever `train()` is called above it: BatchNorm keeps its statistics, dropout and stochastic
depth are off. Dropout that stands beside the head, outside the frozen modules, is the head's and stays on.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from trainer.components.heads import find_head
from trainer.config.schema import ModelConfig
from trainer.errors import ConfigError, nearest
from trainer.exact.batch_norm import hold_in_eval, is_held, release

BACKBONE = "backbone"  # all but the head


class Freezing:
    """Which parts of `model` are frozen in each epoch, a function of the config and the epoch alone.

    `at` sets it. Parts that are thawed later count as trained from the start where the optimizer is built, which
    leaves alone what has no gradient; so build it before the first `at`, and those never trained are not in it.
    """

    def __init__(self, model: nn.Module, section: ModelConfig) -> None:
        self._model = model
        self._modules = {name: module for name, module in model.named_modules() if name}
        self._head = find_head(model, section.head) if _names_backbone(section) else None
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._thaws = _epochs(section.unfreeze)
        if self._thaws and section.freeze is None:
            raise ConfigError("model.unfreeze", "nothing is frozen; set model.freeze too")
        self._frozen = [(0, self._matched("model.freeze", section.freeze))]
        for epochs_done, what in self._thaws.items():
            thawed = self._with_parents(self._matched(f"model.unfreeze.{epochs_done}", what))
            if not thawed & self._frozen[-1][1]:
                raise ConfigError(f"model.unfreeze.{epochs_done}", f"{what} is not frozen by then; leave it out")
            self._frozen.append((epochs_done, self._frozen[-1][1] - thawed))
        for name in self._frozen[-1][1] & self._trained.keys():  # to the run's end
            self._trained[name].requires_grad_(False)
        self._whole = self._matched("model.freeze", BACKBONE) if section.freeze == BACKBONE else None
        self._now: set[str] = set()
        self._held: set[str] = set()  # modules that this holds in eval mode: batch_norm.mode=frozen holds some itself

    def at(self, epoch: int) -> bool:
        """Freeze what is frozen in `epoch` (0-based) and thaw the rest; whether that changed anything."""
        frozen = next(names for start, names in reversed(self._frozen) if start <= epoch)
        if frozen == self._now:
            return False
        before, self._now = self._now, frozen
        for name in frozen - before:
            if name in self._modules and not is_held(self._modules[name]):
                hold_in_eval(self._modules[name])
                self._held.add(name)
        for name in self._held & (before - frozen):
            release(self._modules[name])
            self._held.remove(name)
        for name, parameter in self._trained.items():
            parameter.requires_grad_(name not in frozen)
        return True

    @property
    def head(self) -> nn.Module | None:
        """The head, while the whole backbone is frozen: what goes into it is the same in every epoch. Else None."""
        whole = self._head is not None and self._now == self._whole
        return self._model.get_submodule(self._head) if whole and self._head is not None else None

    def _matched(self, key: str, what: str | list[str] | None) -> set[str]:
        """The names of all modules and parameters that `what` stands for, with all that they contain."""
        if what is None:
            return set()
        if isinstance(what, str) and what != BACKBONE:
            raise ConfigError(key, f'"{what}" is neither {BACKBONE} nor a list of names, such as [conv1, "layer[12]"]')
        found = self._backbone() if isinstance(what, str) else self._named(key, what)
        everything = [*self._modules, *dict(self._model.named_parameters())]
        return {name for name in everything if any(name == f or name.startswith(f"{f}.") for f in found)}

    def _named(self, key: str, patterns: list[str]) -> set[str]:
        holders = {name for name, _ in self._model.named_parameters()}
        holders |= {name for name, module in self._modules.items() if _has_state(module)}
        found: set[str] = set()
        for pattern in patterns:
            matches = {name for name in holders if fnmatchcase(name, pattern)}
            if not matches:
                raise ConfigError(key, f'no part of the model is named "{pattern}"{nearest(pattern, holders)}')
            found |= matches
        return found

    def _backbone(self) -> set[str]:
        """All but the head, as the largest modules and the parameters beside its own path."""
        assert self._head is not None
        found: set[str] = set()
        path, parent = self._head.split("."), self._model
        for depth, step in enumerate(path):
            prefix = "".join(f"{part}." for part in path[:depth])
            found |= {f"{prefix}{n}" for n, child in parent.named_children() if n != step and _has_state(child)}
            found |= {f"{prefix}{n}" for n, _ in parent.named_parameters(recurse=False)}
            parent = parent.get_submodule(step)
        return found

    def _with_parents(self, names: set[str]) -> set[str]:
        """And the modules that hold them: one whose part is trained is itself in training mode."""
        parents = {name.rsplit(".", cut)[0] for name in names for cut in range(1, name.count(".") + 1)}
        return names | parents


def _has_state(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None or next(module.buffers(), None) is not None


def _names_backbone(section: ModelConfig) -> bool:
    return BACKBONE in (section.freeze, *section.unfreeze.values())


def _epochs(section: Mapping[str, Any]) -> dict[int, Any]:
    """Whole epochs done → what is thawed then, in order."""
    for epochs_done, what in section.items():
        key = f"model.unfreeze.{epochs_done}"
        if not epochs_done.isdigit() or int(epochs_done) < 1:
            raise ConfigError(key, f'"{epochs_done}" is not a number of epochs, 1 or more')
        if what != BACKBONE and not (isinstance(what, list) and all(isinstance(name, str) for name in what)):
            raise ConfigError(key, f'{what} is neither {BACKBONE} nor a list of names, such as [conv1, "layer[12]"]')
    return {int(epochs_done): section[epochs_done] for epochs_done in sorted(section, key=int)}
