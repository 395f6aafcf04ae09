"""Which part of a model is the first to give two different results for the same input?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

CHECKSUM_TOLERANCE = 1e-5  # relative; rounding stays below


class Event(NamedTuple):
    """A part of the model began or ended, with checksums of what went in or came out."""

    name: str
    ended: bool
    checksums: list[Tensor]


def first_to_differ(
    model: nn.Module,
    forward: Callable[[], Any],
    before_first: Callable[[], Any],
    before_second: Callable[[], Any],
    *,
    exact: bool,
) -> str | None:
    """The name of the innermost part whose result differs while its input does not; None if no part's does.

    Compared are a forward after `before_first` and one after `before_second`. The model itself is `the model`.
    """
    before_first()
    first_events = _record(model, forward)
    before_second()
    events = _record(model, forward)
    running = ["the model"]
    for one, other in zip(first_events, events, strict=False):
        if (one.name, one.ended) != (other.name, other.ended):
            return running[-1]  # it calls other parts
        if not _is_same(one, other, exact):
            return one.name if one.ended else running[-1]
        if one.ended:
            running.pop()
        else:
            running.append(one.name)
    return None


def _record(model: nn.Module, forward: Callable[[], Any]) -> list[Event]:
    events: list[Event] = []

    def begin(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: Any, keywords: Any) -> None:
            events.append(Event(name, False, _checksums((inputs, keywords))))

        return hook

    def end(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            events.append(Event(name, True, _checksums(output)))

        return hook

    handles = []
    for name, part in model.named_modules():
        label = name or "the model"
        handles.append(part.register_forward_pre_hook(begin(label), with_kwargs=True))
        handles.append(part.register_forward_hook(end(label)))
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return events


@torch.no_grad()
def _checksums(values: Any) -> list[Tensor]:
    """Two numbers of each tensor: keeping all activations would take their memory."""
    checksums = []
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor) and leaf.numel():
            value = leaf.detach()
            if not value.is_floating_point():
                value = value.float()
            checksums += [value.sum(), value.norm()]
    return checksums


def _is_same(one: Event, other: Event, exact: bool) -> bool:
    if len(one.checksums) != len(other.checksums):
        return False
    for value, expected in zip(one.checksums, other.checksums, strict=True):
        if torch.equal(value, expected):
            continue
        if exact or not torch.allclose(
            value, expected, rtol=CHECKSUM_TOLERANCE, equal_nan=True
        ):
            return False
    return True
