"""Are two results of a micro-batch or of a step the same, and where do they part?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.core.proof.state import same_bits
from trainer.errors import listed
from trainer.exact.model_and_loss import ModelAndLoss

Tensors = Mapping[str, Tensor | None]
NAMES_IN_A_MESSAGE = 3


@dataclass(frozen=True)
class Difference:
    """Tensors that part, by name, and by how much all of them together, relative to their norm."""

    names: list[str]
    relative: float

    def __str__(self) -> str:
        return f"{listed(self.names, NAMES_IN_A_MESSAGE)}, {self.relative:.1g} relative"


def gradients_of(model: nn.Module, loss: nn.Module) -> dict[str, Tensor | None]:
    """The gradient of each trained parameter of both, by name."""
    gradients = {}
    for name, parameter in ModelAndLoss(model, loss).named_parameters():
        if parameter.requires_grad:
            gradients[name] = parameter.grad
    return gradients


def compare(
    first: Tensors, second: Tensors, tolerance: float | None
) -> Difference | None:
    """Where two results part; None where they are equal, bit for bit if there is no `tolerance`.

    A tolerance is for the norm of all tensors together: a tensor that is nothing but rounding has no digits to share.
    Results with a NaN or an infinity are not compared in this way.
    """
    distances: dict[str, float] = {}
    sizes = []
    for name in first:
        distances[name], size = _norms(first[name], second[name])
        sizes.append(size)
    total = math.hypot(*sizes)
    distance = math.hypot(*distances.values())
    relative = distance / total if total else 0.0
    if tolerance is None:
        names = []
        for name, tensor in first.items():
            if not _is_same(tensor, second[name]):
                names.append(name)
        return Difference(names, relative) if names else None
    if not relative > tolerance:
        return None
    return Difference(_farthest(distances), relative)


def _farthest(distances: Mapping[str, float]) -> list[str]:
    """The names of those that take part in the whole distance, the farthest first."""
    whole = math.hypot(*distances.values())
    # Where all take part alike, each is at whole / √n. What is far below that is rounding.
    bound = 0.1 * whole / math.sqrt(len(distances))
    names = [name for name, distance in distances.items() if distance > bound]
    return sorted(names, key=lambda name: -distances[name])


def _norms(first: Tensor | None, second: Tensor | None) -> tuple[float, float]:
    """The norm of the difference, and the larger norm of both."""
    if first is None and second is None:
        return 0.0, 0.0
    one, other = _as_floats(first), _as_floats(second)
    if one is None or other is None:
        present = one if other is None else other
        assert present is not None
        size = float(present.norm())
        return size, size
    if one.shape != other.shape:
        return math.inf, 1.0
    distance = float((one - other).norm())
    larger = max(float(one.norm()), float(other.norm()))
    return distance, larger


def _as_floats(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    tensor = tensor.detach()
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj())
    return tensor if tensor.is_floating_point() else tensor.to(torch.float32)


def _is_same(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return same_bits(first, second)
