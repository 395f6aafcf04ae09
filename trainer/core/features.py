"""Features of validation samples, cached while the backbone that computes them is frozen.

A backbone that is entirely frozen, in eval mode, computes the same features from the same pixels in every epoch, and
validation images are not augmented at random. So from the second evaluation on only the head runs, on the same
tensors in the same batches, with the same bits as a result. A backbone that draws, as Monte Carlo dropout does, is run
each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from trainer.data.batches import MicroBatch
from trainer.exact.seeding import draw_state

MAX_BYTES = 1 << 30  # of features per process; if there are more, none are cached


class Features:
    """The head's inputs, batch by batch. `find_head` returns the head, or None while the backbone is trained."""

    def __init__(self, find_head: Callable[[], nn.Module | None]) -> None:
        self._find_head = find_head
        self.clear()

    def clear(self) -> None:
        """Forget all features: the model's weights have changed."""
        self._batches: list[MicroBatch] = []
        self._bytes = 0
        self._is_complete = False
        # The head is the model's last operation, and the features are few enough.
        self._is_usable = True

    def batches(self) -> list[tuple[nn.Module, MicroBatch]] | None:
        """The head, and each batch with its features as inputs; None unless all are cached."""
        head = self._find_head()
        if head is None or not self._is_complete:
            return None
        return [(head, batch) for batch in self._batches]

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[Callable[[MicroBatch], None]]:
        """Yields a function that caches a batch's features; call it with each batch after `model` has run on it."""
        head = self._find_head() if self._is_usable else None
        if head is None:
            yield lambda batch: None
            return
        self.clear()
        # The head's (inputs, output) in the model's last forward.
        calls: list[tuple[tuple[Any, ...], Any]] = []
        states: list[Any] = []  # of the generators, where the model begins

        def note_draws(_: nn.Module, inputs: Any) -> None:
            states.append(draw_state(next(model.parameters()).device))

        def check_draws(_: nn.Module, inputs: Any) -> None:
            if states[-1] != draw_state(next(model.parameters()).device):
                self._is_usable = False

        def record_call(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            calls.append((inputs, output))

        def check_head_is_last(_: nn.Module, inputs: Any, output: Any) -> None:
            if len(calls) != 1:
                self._is_usable = False
                return
            head_inputs, head_output = calls[0]
            are_tensors = [isinstance(value, Tensor) for value in head_inputs]
            if output is not head_output or are_tensors != [True]:
                self._is_usable = False

        def record(batch: MicroBatch) -> None:
            if self._is_usable:
                head_inputs, _ = calls[0]
                features: Tensor = head_inputs[0]
                self._batches.append(batch._replace(inputs=features))
                self._bytes += features.nbytes
                self._is_usable = self._bytes <= MAX_BYTES
            calls.clear()
            states.clear()

        with (
            model.register_forward_pre_hook(note_draws),
            head.register_forward_pre_hook(check_draws),
            head.register_forward_hook(record_call),
            model.register_forward_hook(check_head_is_last),
        ):
            yield record
        self._is_complete = self._is_usable
        if not self._is_usable:
            self._batches = []
