"""Does a micro-batch leave the same traces, whether it is replayed or eager? From the same state, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.components.task import WeightedSum
from trainer.core.graphs.recorded import Recorded, unseen
from trainer.core.proof.state import same_bits
from trainer.core.run import Run
from trainer.exact.model_and_loss import ModelAndLoss
from trainer.exact.structures import tensors_in

Result = tuple[Any, WeightedSum]
# What rounding explains, relative to the norm: what standard mode promises of a step.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5}
ROUNDING_OF_AUTOCAST = 1e-2  # bf16 has 8 significant bits, fp16 has 11


class Traces(NamedTuple):
    """Copies of what a micro-batch leaves, by what a message calls it."""

    others: dict[str, Tensor]
    gradients: dict[str, Tensor]


class Difference(NamedTuple):
    """`what` differs first; "" if nothing does. `is_rounding`, if all differences may be."""

    what: str
    is_rounding: bool


def compare(
    run: Run,
    recorded: Recorded,
    first: Callable[[], Result],
    second: Callable[[], Result],
) -> tuple[Result, Difference]:
    """What `second` returns, having left its traces, and how those of `first`, which leaves none, differ.

    Waits for the device.
    """
    whole = ModelAndLoss(run.module, run.task)
    before = [parameter.grad for parameter in recorded.parameters]
    with unseen(run, recorded.buffers):
        for parameter, gradient in zip(recorded.parameters, before, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        traces = _traces_of(whole, first())
    result = second()
    bound = ROUNDING[run.precision.dtype]
    if run.precision.autocasts:
        bound = ROUNDING_OF_AUTOCAST
    return result, _difference(traces, _traces_of(whole, result), bound)


def _traces_of(whole: ModelAndLoss, result: Result) -> Traces:
    output, loss = result
    gradients: dict[str, Tensor] = {}
    for name, parameter in whole.named_parameters():
        if parameter.grad is not None:
            gradients[f"the gradient of {name}"] = parameter.grad.clone()
    others = {"the loss": loss.total}
    if isinstance(loss.weight, Tensor):
        others["the loss's weight"] = loss.weight
    for number, tensor in enumerate(tensors_in(output)):
        name = f"tensor {number} of the output" if number else "the output"
        others[name] = tensor
    for name, buffer in whole.named_buffers():
        others[f"buffer {name}"] = buffer
    for name, tensor in others.items():
        others[name] = tensor.detach().clone()
    return Traces(others, gradients)


def _difference(first: Traces, second: Traces, bound: float) -> Difference:
    different = []
    for these, those in zip(first, second, strict=True):
        if these.keys() != those.keys():
            missing = min(these.keys() ^ those.keys())
            return Difference(missing, is_rounding=False)
        for name, tensor in those.items():
            if not same_bits(these[name], tensor):
                different.append(name)
    if not different:
        return Difference("", is_rounding=True)
    return Difference(different[0], _is_rounding(first, second, bound))


def _is_rounding(first: Traces, second: Traces, bound: float) -> bool:
    """Gradients are judged as one vector: some of them are nothing but rounding, as of a bias before a BatchNorm."""
    for name, tensor in second.others.items():
        if not _is_close([first.others[name]], [tensor], bound):
            return False
    first_gradients = list(first.gradients.values())
    second_gradients = list(second.gradients.values())
    return _is_close(first_gradients, second_gradients, bound)


def _is_close(first: list[Tensor], second: list[Tensor], bound: float) -> bool:
    """True if two lists of tensors, each taken as one vector, are equal up to `bound` of the second's norm."""
    distances = []
    norms = []
    for one, other in zip(first, second, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        difference = one.double() - other.double()
        distances.append(difference.square().sum())
        norms.append(other.double().square().sum())
    # Squares throughout: no root is needed to compare.
    return bool(sum(distances) <= bound**2 * sum(norms))
