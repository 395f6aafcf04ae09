"""Do gradients come in one piece?

A backward adds to a parameter's gradient once, however often its graph uses the parameter. A backward within it, as
that of `torch.utils.checkpoint` with `use_reentrant=True`, adds by itself; and (s + a) + b has other bits than
s + (a + b).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import TypeVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

K = TypeVar("K")


def watch_gradients(
    parameters: Iterable[tuple[K, nn.Parameter]], note: Callable[[K, Tensor], None]
) -> list[RemovableHandle]:
    """Let backwards call `note` for each parameter, by its key, once they have added to its gradient."""
    handles = []
    for key, parameter in parameters:
        hook = partial(note, key)
        handles.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
    return handles


class GradientPieces(AbstractContextManager["GradientPieces"]):
    """The context of a micro-batch.

    `in_pieces` is at its end the name of a parameter to whose gradient it has added more than once, else None.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self._seen: set[str] = set()
        self._handles: list[RemovableHandle] = []
        self.in_pieces: str | None = None

    def __enter__(self) -> GradientPieces:
        self._handles = watch_gradients(self._parameters.items(), self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, name: str, parameter: Tensor) -> None:
        if name in self._seen:
            self.in_pieces = name
        self._seen.add(name)
