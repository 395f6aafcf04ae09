"""Is a replay of a micro-batch what eager does? To the last bit, from the same state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from trainer.components.task import WeightedSum
from trainer.core.graphs.recorded import Recorded, unseen
from trainer.core.proof.state import same_bits
from trainer.core.run import Run
from trainer.exact.model_and_loss import ModelAndLoss
from trainer.exact.structures import tensors_in

Result = tuple[Any, WeightedSum]
# What a micro-batch leaves, by what a message calls it.
Traces = list[tuple[str, Tensor | None]]


def compare(
    run: Run,
    recorded: Recorded,
    replay: Callable[[], Result],
    eager: Callable[[], Result],
) -> tuple[Result, str]:
    """What `eager` returns, after it has left its traces, and what differs from them after a replay; "" if nothing does.

    Waits for the device.
    """
    whole = ModelAndLoss(run.module, run.task)
    before = [parameter.grad for parameter in recorded.parameters]
    with unseen(run, recorded.buffers):
        for parameter, gradient in zip(recorded.parameters, before, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        replayed = _traces_of(whole, replay())
    result = eager()
    return result, _first_different(replayed, _traces_of(whole, result))


def _traces_of(whole: ModelAndLoss, result: Result) -> Traces:
    output, loss = result
    traces: Traces = [("the loss", loss.total)]
    if isinstance(loss.weight, Tensor):
        traces.append(("the loss's weight", loss.weight))
    traces += [("the output", tensor) for tensor in tensors_in(output)]
    for name, parameter in whole.named_parameters():
        traces.append((f"the gradient of {name}", parameter.grad))
    for name, buffer in whole.named_buffers():
        traces.append((f"buffer {name}", buffer))
    copies: Traces = []
    for name, tensor in traces:
        copies.append((name, None if tensor is None else tensor.detach().clone()))
    return copies


def _first_different(replayed: Traces, eager: Traces) -> str:
    if len(replayed) != len(eager):
        return "the output"
    for (name, first), (_, second) in zip(replayed, eager, strict=True):
        if first is None or second is None:
            is_same = first is second
        else:
            is_same = same_bits(first, second)
        if not is_same:
            return name
    return ""
