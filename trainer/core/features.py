"""Features of validation samples, kept while the backbone that makes them is frozen.

A backbone that is frozen whole, in eval mode, makes the same features of the same pixels in every epoch; validation
images are not augmented by chance. So from the second evaluation on, only the head is run: on the same tensors, in
the same batches, to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from trainer.data.samples import MicroBatch

LIMIT = 1 << 30  # bytes of features that each process keeps; of more, none


class Features:
    """What went into the head, batch by batch; `head` tells the present head, None while the backbone is trained."""

    def __init__(self, head: Callable[[], nn.Module | None]) -> None:
        self._head = head
        self.clear()

    def clear(self) -> None:
        self._held: list[MicroBatch] = []
        self._bytes = 0
        self._complete = False
        self._usable = True  # the head is the model's last operation, and its features are few enough

    def held(self) -> list[tuple[nn.Module, MicroBatch]] | None:
        """The head and each batch's features in place of its inputs; None where they are not known."""
        head = self._head()
        return [(head, batch) for batch in self._held] if head is not None and self._complete else None

    @contextmanager
    def recorded(self, model: nn.Module) -> Iterator[Callable[[MicroBatch], None]]:
        """Within it, `model` is run on each batch, which is then given to the function that this yields."""
        head = self._head() if self._usable else None
        if head is None:
            yield lambda batch: None
            return
        self.clear()
        calls: list[tuple[Any, Any]] = []

        def see(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            calls.append((inputs[0], output))

        def compare(_: nn.Module, inputs: Any, output: Any) -> None:
            self._usable &= len(calls) == 1 and output is calls[0][1]

        def record(batch: MicroBatch) -> None:
            if self._usable:
                features: Tensor = calls[0][0]
                self._held.append(batch._replace(inputs=features))
                self._bytes += features.nbytes
                self._usable = self._bytes <= LIMIT
            calls.clear()

        with head.register_forward_hook(see), model.register_forward_hook(compare):
            yield record
        self._complete = self._usable
        if not self._usable:
            self._held = []
