"""The backward of a loss by autograd's engine itself: what `torch.autograd.backward` does, without its preparations."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.distributed.small import config
from trainer import Trainer
from trainer.core import autograd_engine
from trainer.core.autograd_engine import backward
from trainer.data.datasets import ImageArrays


def losses(model: nn.Module) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 6, 4, generator=draw)
    return [model(part).square().sum() for part in inputs]


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [parameter.grad for parameter in model.parameters()]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def test_gradients_add_up_to_torchs_and_the_graph_goes() -> None:
    assert autograd_engine._engine() is not None
    model = net()
    other = copy.deepcopy(model)
    scale = torch.tensor(0.3)
    ours = losses(model)
    for loss in ours:
        backward(loss, scale)
    for loss in losses(other):
        torch.autograd.backward(loss, scale)
    for mine, theirs in zip(gradients(model), gradients(other), strict=True):
        assert mine is not None
        assert theirs is not None
        assert torch.equal(mine, theirs)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        backward(ours[0], scale)


class Seen(TorchFunctionMode):
    """Notes the names of the functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


def test_who_replaces_torchs_function_sees_the_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = torch.tensor(2.0, requires_grad=True)
    with Seen() as seen:
        backward(weight * 3, torch.tensor(1.0))
    assert "backward" in seen.names
    calls = []
    monkeypatch.setattr(torch.autograd, "backward", lambda *given: calls.append(given))
    loss, scale = weight * 3, torch.tensor(1.0)
    backward(loss, scale)
    assert calls == [(loss, scale)]


@pytest.mark.parametrize("replacement", [None, lambda *_, **__: None])
def test_without_an_engine_that_is_known_torch_does_it(
    replacement: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This torch has no such function, or one that does something else by now."""
    monkeypatch.setattr(torch.autograd.graph, "_engine_run_backward", replacement)
    autograd_engine._engine.cache_clear()
    try:
        assert autograd_engine._engine() is None
    finally:
        monkeypatch.undo()
    weight = torch.tensor(2.0, requires_grad=True)
    backward(weight * 3, torch.tensor(0.5))
    autograd_engine._engine.cache_clear()
    assert weight.grad == 1.5


def test_a_step_makes_none_of_torchs_preparations(tmp_path: Path) -> None:
    images = torch.randint(256, (12, 1, 2, 2), dtype=torch.uint8)
    data = ImageArrays(images, torch.arange(12) % 3)
    settings = config(tmp_path, best__metric="train/loss")
    calls = []

    def see(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename == torch.autograd.__file__:
            calls.append(frame.f_code.co_name)

    class Watched(Trainer):
        def train_step(self, step: Any) -> None:
            sys.setprofile(see)
            super().train_step(step)
            sys.setprofile(None)

    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    Watched(settings, model=model, train_data=data).fit()
    assert not calls
