"""The modes of a model's modules, training or eval, put back as they were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from trainer.exact.batch_norm import is_held


@contextmanager
def preserved_modes(root: nn.Module) -> Iterator[None]:
    """Put `root` and every module in it back into the mode that it has now.

    `root.train(…)` alone would not: it also reaches the layers that somebody has put into another mode. It is called
    all the same, because a module's own `train` may do more than set the mode.
    """
    was_training = root.training
    modes = {module: module.training for module in root.modules()}
    try:
        yield
    finally:
        if root.training != was_training:
            root.train(was_training)
        restore_modes(modes)


def modes_of_others(root: nn.Module) -> dict[nn.Module, bool]:
    """The modes of those modules of `root` that are not frozen by the run: theirs are nobody else's."""
    return {module: module.training for module in root.modules() if not is_held(module)}


def restore_modes(modes: Mapping[nn.Module, bool]) -> None:
    """Put modules into the `modes` they had, unless the run holds them in eval mode by now."""
    for module, training in modes.items():
        if module.training != training and not is_held(module):
            module.training = training
