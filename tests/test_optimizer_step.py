"""`update` and `forget_gradients` do what torch's own methods do, and whoever watches those sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim import optimizer as torch_optimizer

from trainer.components.optimizer_step import forget_gradients, update


class OwnStep(SGD):
    """As a library's optimizer that has a step of its own."""

    steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        return super().step(closure)


class OwnZeroGrad(SGD):
    calls = 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.calls += 1
        super().zero_grad(set_to_none)


def net_and(make: Callable[..., Optimizer], **options: Any) -> tuple[Any, Optimizer]:
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    return net, make(net.parameters(), lr=0.1, **options)


@pytest.mark.parametrize(
    ("make", "options"),
    [(SGD, {"momentum": 0.9, "weight_decay": 0.1}), (Adam, {}), (OwnStep, {})],
)
def test_the_same_bits_as_torchs_own(make: Any, options: Any) -> None:
    net, optimizer = net_and(make, **options)
    reference, of_reference = net_and(make, **options)
    for _ in range(3):
        for model in (net, reference):
            model(torch.ones(1, 3)).square().sum().backward()
        update(optimizer)
        of_reference.step()
        forget_gradients(optimizer)
        of_reference.zero_grad()
        assert all(parameter.grad is None for parameter in net.parameters())
    for ours, theirs in zip(net.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert getattr(optimizer, "steps", 3) == 3


def test_hooks_and_methods_of_ones_own_are_called() -> None:
    calls: list[str] = []

    def noted(name: str) -> Callable[..., None]:
        return lambda *_: calls.append(name)

    _, optimizer = net_and(SGD)
    update(optimizer)
    assert calls == []
    before = optimizer.register_step_pre_hook(noted("before"))
    after = optimizer.register_step_post_hook(noted("after"))
    everywhere = torch_optimizer.register_optimizer_step_post_hook(noted("everywhere"))
    update(optimizer)
    assert calls == ["before", "after", "everywhere"]
    for handle in (before, after, everywhere):
        handle.remove()
    calls.clear()
    # As a schedule of torch's does.
    optimizer.step = noted("replaced")  # type: ignore[assignment, method-assign]
    optimizer.zero_grad = noted("zero_grad")  # type: ignore[method-assign]
    update(optimizer)
    forget_gradients(optimizer)
    assert calls == ["replaced", "zero_grad"]
    _, other = net_and(OwnZeroGrad)
    forget_gradients(other)
    assert other.calls == 1  # type: ignore[attr-defined]


def test_torchs_marks_are_made_for_a_profiler_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    marks: list[str] = []
    mark = torch.autograd.profiler.record_function

    def noted(name: str, *more: Any) -> Any:
        marks.append(name)
        return mark(name, *more)

    monkeypatch.setattr(torch.autograd.profiler, "record_function", noted)
    _, optimizer = net_and(SGD)
    update(optimizer)
    forget_gradients(optimizer)
    assert marks == []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        update(optimizer)
    assert marks == ["Optimizer.step#SGD.step"]
