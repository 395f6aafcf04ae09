"""Do gradients come in one piece?

A backward adds to a parameter's gradient once, however often its graph uses the parameter. A backward within it, as
that of `torch.utils.checkpoint` with `use_reentrant=True`, adds by itself; and (s + a) + b has other bits than
s + (a + b).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


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
        for name, parameter in self._parameters.items():
            note = partial(self._note, name)
            hook = parameter.register_post_accumulate_grad_hook(note)  # type: ignore[no-untyped-call]
            self._handles.append(hook)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, name: str, parameter: Tensor) -> None:
        if name in self._seen:
            self.in_pieces = name
        self._seen.add(name)
