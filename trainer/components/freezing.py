"""Which parts of a model are not trained, and from which epoch on they are.

A frozen parameter requires no gradient, so a backbone that is frozen whole builds no graph. A frozen module is in eval
mode and stays there whatever `train()` is called above it: BatchNorm keeps its statistics, dropout and stochastic depth
are off. Dropout beside the head, outside the frozen modules, belongs to the head and stays on.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from trainer.components.heads import find_head, parent_names
from trainer.config.model_sections import ModelConfig
from trainer.errors import ConfigError, nearest
from trainer.exact.batch_norm import hold_in_eval, is_held, release

BACKBONE = "backbone"  # all but the head


class Freezing:
    """Which parts of `model` are frozen in each epoch: a function of the config and the epoch alone.

    Build the optimizer between this and the first `apply`. By then what is never trained requires no gradient, so the
    optimizer leaves it out; what is thawed later still does, so the optimizer holds it from the start.
    """

    def __init__(self, model: nn.Module, section: ModelConfig) -> None:
        self._model = model
        self._modules = dict(model.named_modules())
        del self._modules[""]  # the model itself
        self._trainable: dict[str, nn.Parameter] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._trainable[name] = parameter
        names_backbone = BACKBONE in (section.freeze, *section.unfreeze.values())
        self._head = find_head(model, section.head) if names_backbone else None
        self._frozen_from = self._plan(section)
        _, never_trained = self._frozen_from[-1]
        for name in never_trained & self._trainable.keys():
            self._trainable[name].requires_grad_(False)
        self._whole_backbone: set[str] | None = None
        if section.freeze == BACKBONE:
            self._whole_backbone = self._matching("model.freeze", BACKBONE)
        self._frozen: set[str] = set()
        # By this object; batch_norm.mode=frozen holds others.
        self._put_in_eval: set[str] = set()

    def _plan(self, section: ModelConfig) -> list[tuple[int, set[str]]]:
        """(number of epochs done, the names that are frozen from then on), in order."""
        thaws = _thaws(section)
        if thaws and section.freeze is None:
            raise ConfigError(
                "model.unfreeze", "nothing is frozen; set model.freeze too"
            )
        frozen = self._matching("model.freeze", section.freeze)
        plan = [(0, frozen)]
        for epochs_done, patterns in thaws:
            key = f"model.unfreeze.{epochs_done}"
            thawed = _with_parents(self._matching(key, patterns))
            if not thawed & frozen:
                raise ConfigError(
                    key, f"{patterns} is not frozen by then; leave it out"
                )
            frozen = frozen - thawed  # a new set: the earlier one is part of the plan
            plan.append((epochs_done, frozen))
        return plan

    def apply(self, epoch: int) -> bool:
        """Freeze what is frozen in `epoch` (0-based) and thaw the rest; True if that changed anything."""
        frozen = next(
            names for start, names in reversed(self._frozen_from) if start <= epoch
        )
        if frozen == self._frozen:
            return False
        for name in (frozen - self._frozen) & self._modules.keys():
            # A module that something else holds in eval mode must not be released when it is thawed here.
            if not is_held(self._modules[name]):
                hold_in_eval(self._modules[name])
                self._put_in_eval.add(name)
        for name in self._put_in_eval - frozen:
            release(self._modules[name])
        self._put_in_eval &= frozen
        for name, parameter in self._trainable.items():
            parameter.requires_grad_(name not in frozen)
        self._frozen = frozen
        return True

    @property
    def head(self) -> nn.Module | None:
        """The head, while the whole backbone is frozen, so that its input is the same in every epoch; else None."""
        if self._head is None or self._frozen != self._whole_backbone:
            return None
        return self._model.get_submodule(self._head)

    def _matching(self, key: str, patterns: str | list[str] | None) -> set[str]:
        """The names of all modules and parameters that `patterns` stands for, with all that they contain."""
        if patterns is None:
            return set()
        if isinstance(patterns, list):
            roots = self._matching_names(key, patterns)
        elif patterns == BACKBONE:
            roots = self._backbone()
        else:
            raise ConfigError(
                key,
                f'"{patterns}" is neither {BACKBONE} nor a list of names, such as [conv1, "layer[12]"]',
            )
        names = [*self._modules, *dict(self._model.named_parameters())]
        return {
            name for name in names if not roots.isdisjoint([name, *parent_names(name)])
        }

    def _matching_names(self, key: str, patterns: list[str]) -> set[str]:
        """The parameters, and modules with parameters or buffers, that match any of `patterns`."""
        names = {name for name, _ in self._model.named_parameters()}
        for name, module in self._modules.items():
            if _has_state(module):
                names.add(name)
        matches: set[str] = set()
        for pattern in patterns:
            of_pattern = {name for name in names if fnmatchcase(name, pattern)}
            if not of_pattern:
                raise ConfigError(
                    key,
                    f'no part of the model is named "{pattern}"{nearest(pattern, names)}',
                )
            matches |= of_pattern
        return matches

    def _backbone(self) -> set[str]:
        """All but the head: whatever lies beside the path from the model to its head, as the largest modules."""
        assert self._head is not None
        names: set[str] = set()
        parent, prefix = self._model, ""
        for step in self._head.split("."):
            for name, child in parent.named_children():
                if name != step and _has_state(child):
                    names.add(prefix + name)
            for name, _ in parent.named_parameters(recurse=False):
                names.add(prefix + name)
            parent = parent.get_submodule(step)
            prefix = f"{prefix}{step}."
        return names


def _with_parents(names: set[str]) -> set[str]:
    """The names, and the modules around them: one with a trained part is itself in training mode."""
    return names.union(*map(parent_names, names))


def _has_state(module: nn.Module) -> bool:
    return (
        next(module.parameters(), None) is not None
        or next(module.buffers(), None) is not None
    )


def _thaws(section: ModelConfig) -> list[tuple[int, Any]]:
    """(number of whole epochs done, what is thawed then), in order."""
    for epochs_done, patterns in section.unfreeze.items():
        key = f"model.unfreeze.{epochs_done}"
        if not epochs_done.isdecimal() or int(epochs_done) < 1:
            raise ConfigError(
                key, f'"{epochs_done}" is not a number of epochs, 1 or more'
            )
        is_list_of_names = isinstance(patterns, list) and all(
            isinstance(name, str) for name in patterns
        )
        if patterns != BACKBONE and not is_list_of_names:
            raise ConfigError(
                key,
                f'{patterns} is neither {BACKBONE} nor a list of names, such as [conv1, "layer[12]"]',
            )
    return [
        (int(epochs_done), section.unfreeze[epochs_done])
        for epochs_done in sorted(section.unfreeze, key=int)
    ]
