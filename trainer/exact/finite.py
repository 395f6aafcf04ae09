"""Whether losses, gradients and weights are finite numbers: found on the device, read by the host at log intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainer.exact.shards import local_part

CAPACITY = 256  # steps between two reads; more of them cost a copy of the flags


@dataclass
class BadSteps:
    """Numbers of the steps, in order, whose loss or whose gradient was not finite. A loss is a rank's own."""

    loss: list[int] = field(default_factory=list)
    gradient: list[int] = field(default_factory=list)

    def first(self) -> int | None:
        """The first of them; None if all was finite."""
        return min([*self.loss, *self.gradient], default=None)


class FiniteFlags:
    """A flag for the loss and one for the gradient of each step since the last `read`. Marking never waits."""

    def __init__(self, device: torch.device) -> None:
        self._flags = torch.zeros(CAPACITY, 2, dtype=torch.float32, device=device)
        # Views, made once: taking one apart in every step would cost as much as the check.
        self._cells = torch.split(self._flags.view(-1), 1)
        self._full: list[Tensor] = []
        self._steps: list[int] = []
        self._one = torch.ones(1, dtype=torch.float32, device=device)
        # Of one step, for `are_finite`.
        self._any = torch.zeros(1, dtype=torch.float32, device=device)
        # torch.amp's check is one operation for any number of tensors, on the devices that have it.
        self._has_fast_check = device.type in ("cpu", "cuda", "xpu")

    def mark(
        self, step: int, losses: list[Tensor], gradients: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Note whether they are finite; returns both flags, `(1,)` each: 1 if the loss, or the gradient, is not.

        `losses` are detached.
        """
        slot = len(self._steps) % CAPACITY
        if slot == 0 and self._steps:
            self._full.append(self._flags.clone())
            self._flags.zero_()
        self._steps.append(step)
        of_loss: Tensor = self._cells[2 * slot]
        of_gradient: Tensor = self._cells[2 * slot + 1]
        self._check(losses, of_loss)
        self._check(gradients, of_gradient)
        return of_loss, of_gradient

    def are_finite(self, losses: list[Tensor], gradients: list[Tensor]) -> bool:
        """Whether all of them are, without a note of it. Waits for the device."""
        self._check([*losses, *gradients], self._any)
        if not self._any.item():
            return True
        self._any.zero_()
        return False

    def read(self) -> BadSteps:
        """The steps since the last read that were not finite. Waits for the device."""
        bad = BadSteps()
        if not self._steps:
            return bad
        all_flags = torch.cat([*self._full, self._flags])
        # One copy for all steps since the last row: this is where the host waits.
        rows = all_flags[: len(self._steps)].tolist()
        for step, (of_loss, of_gradient) in zip(self._steps, rows, strict=True):
            if of_loss:
                bad.loss.append(step)
            if of_gradient:
                bad.gradient.append(step)
        self._flags.zero_()
        self._full = []
        self._steps = []
        return bad

    def _check(self, tensors: list[Tensor], flag: Tensor) -> None:
        """Set `flag` to 1 if a value is not finite. The tensors are multiplied by 1 at most, which changes no bit."""
        if not tensors:
            return
        if not self._has_fast_check:
            flag.copy_(~_are_finite(tensors).all())
            return
        try:
            torch._amp_foreach_non_finite_check_and_unscale_(tensors, flag, self._one)
        except (RuntimeError, TypeError):
            # It takes tensors of one dtype at a time, and neither sparse nor complex ones.
            for tensor in tensors:
                values = [_plain(tensor)]
                torch._amp_foreach_non_finite_check_and_unscale_(
                    values, flag, self._one
                )


def first_not_finite(tensors: dict[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or an infinity; None if none does. Waits for the device.

    Of tensors that are shared out, this rank looks at its own parts.
    """
    names = []
    values = []
    for name, tensor in tensors.items():
        part = local_part(tensor)
        may_be_infinite = part.is_floating_point() or part.is_complex()
        if may_be_infinite and part.numel():
            names.append(name)
            values.append(part.detach())
    if not values or _have_finite_sum(values):
        return None
    are_finite = _are_finite(values).tolist()
    for name, is_finite in zip(names, are_finite, strict=True):
        if not is_finite:
            return name
    return None


def _have_finite_sum(tensors: list[Tensor]) -> bool:
    """True only if all are finite, found by reading them once; False, too, where a sum of large values overflows.

    On the CPU it takes a tenth of the time of the norms that tell which one is not. Elsewhere it would be many small
    operations in place of one.
    """
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return False
    sums = [wide_sum(tensor).to(torch.float64) for tensor in tensors]
    return bool(torch.stack(sums).isfinite().all())


def wide_sum(tensor: Tensor) -> Tensor:
    """The sum of all values, fp32 or fp64 `()`: finite only if every value is."""
    values = _plain(tensor)
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    return values.sum(dtype=wide)


def _are_finite(tensors: list[Tensor]) -> Tensor:
    """Whether each tensor is finite, by its largest absolute value: another norm could overflow."""
    values = [_plain(tensor) for tensor in tensors]
    largest = torch._foreach_norm(values, math.inf)
    return torch.stack([value.isfinite() for value in largest])


def _plain(tensor: Tensor) -> Tensor:
    """The values of a tensor as real numbers: of a sparse one those that are stored."""
    if tensor.is_sparse:
        tensor = tensor._values()
    if not tensor.is_complex():
        return tensor
    return torch.view_as_real(tensor.resolve_conj())
