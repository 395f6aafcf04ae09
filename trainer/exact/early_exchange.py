"""The exchange of gradients begins while a rank's last backward still goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trainer.exact.exchange import ShardExchange, Terms
from trainer.exact.gradient_pieces import watch_gradients
from trainer.exact.plan import Step

Mark = tuple[int, int]


class EarlyExchange(AbstractContextManager["EarlyExchange"]):
    """The context of a rank's last micro-batch of a step.

    It starts each bucket of `exchange` but the last, in their order, as soon as the gradients of its parameters are
    there. `ShardExchange.sum` starts those whose gradients do not all come.

    `parameters` are the first tensors of the exchange's layout. `nodes` are what this rank sends, and `contribution`
    is the one of their terms that the micro-batch makes: it is filled in as gradients come.

    `in_pieces` is at its end the name of a parameter whose gradient has changed after it was sent, else None.
    """

    def __init__(
        self,
        exchange: ShardExchange,
        parameters: Mapping[str, nn.Parameter],
        step: Step,
        nodes: Sequence[Terms],
        contribution: list[Tensor],
    ) -> None:
        self._exchange = exchange
        self._names = list(parameters)
        self._parameters = list(parameters.values())
        self._step = step
        self._nodes = nodes
        self._contribution = contribution
        self._handles: list[RemovableHandle] = []
        # Of each bucket that is still to be sent, the parameters without their gradient.
        self._missing: list[set[int]] = []
        self._bucket_of: dict[int, set[int]] = {}
        self._sent: list[int] = []
        self._marks: list[Mark] = []
        self.in_pieces: str | None = None

    def __enter__(self) -> EarlyExchange:
        for indices in self._exchange.buckets[:-1]:
            self._missing.append(set(indices))
            self._bucket_of.update(dict.fromkeys(indices, self._missing[-1]))
        self._handles = watch_gradients(enumerate(self._parameters), self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for index, mark in zip(self._sent, self._marks, strict=True):
            if self._mark(index) != mark:
                self.in_pieces = self._names[index]

    def _note(self, index: int, parameter: Tensor) -> None:
        # Not before the next parameter: other hooks of this one may still change its gradient.
        while self._missing and not self._missing[0]:
            self._missing.pop(0)
            self._start_next()
        if index in self._bucket_of:
            self._bucket_of[index].discard(index)

    def _start_next(self) -> None:
        indices = self._exchange.next_bucket
        for index in indices:
            gradient = self._parameters[index].grad
            if gradient is None:  # a hook has taken it away
                self._missing.clear()
                return
            self._contribution[index] = gradient
        self._exchange.start(self._step, self._nodes)
        self._sent += indices
        self._marks += map(self._mark, indices)

    def _mark(self, index: int) -> Mark:
        """Another value after any change of the gradient that torch notes."""
        gradient = self._parameters[index].grad
        return id(gradient), -1 if gradient is None else gradient._version
