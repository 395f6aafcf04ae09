"""The gradient of a whole step from the micro-batches of all ranks.

DDP averages over ranks and starts when the last backward of a rank does, bucket by bucket, while it runs; the
micro-batches before it only add up. A step in which some rank has nothing to do, which every rank knows from
the plan, is run without DDP and summed after the backward: DDP would wait for that rank for ever, in the backward
and, early in a run, even in the forward, where it agrees on its buckets.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.exact.plan import IndexRange, Step
from trainer.process.ranks import Ranks


class Gradients:
    """Scales, sums and measures gradients: `leaf` and `seed` for each forward, `reduce` at the step's end."""

    def __init__(self, model: nn.Module, module: nn.Module, ranks: Ranks, *, may_be_unused: bool) -> None:
        self._model = model
        self._module = module
        self._ranks = ranks
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._may_be_unused = may_be_unused
        self._checked = False
        self._averaged_over = ranks.count  # DDP divides by it
        self._weights: list[tuple[int, Tensor]] = []  # of this rank's forwards, by their first micro-batch
        self._seeds: dict[float, Tensor] = {}  # a few values recur; each is moved to the device once

    def model(self, step: Step) -> nn.Module:
        """What `step`'s micro-batches are run through."""
        return self._module if step.has_idle_rank else self._model

    def leaf(self, step: Step, indices: IndexRange) -> AbstractContextManager[Any]:
        """The context of one forward and backward, of the micro-batches in `indices`."""
        if self._ranks.count == 1 or step.has_idle_rank or indices[1] == step.ranks[self._ranks.rank][1]:
            return nullcontext()
        return self._ranks.accelerator.no_sync(self._model)  # type: ignore[no-any-return]

    def seed(self, step: Step, indices: IndexRange, loss: Tensor, weight: Tensor | int) -> Tensor:
        """The gradient that a backward starts from, a 0-dim tensor: what its micro-batches' loss sum is divided by.

        1 / (the step's targets), times the ranks that DDP will divide by. Where the targets' weight depends on
        their values, it is not known yet: 1 / (the step's samples), and `reduce` corrects it.
        """
        if isinstance(weight, Tensor):
            self._weights.append((indices[0], weight))
            value = self._averaged_over / step.size
        else:
            samples = step.micro_batches[indices[1] - 1][1] - step.micro_batches[indices[0]][0]
            value = self._averaged_over * samples / (step.size * weight)
        if value not in self._seeds:
            self._seeds[value] = torch.tensor(value, dtype=loss.dtype, device=loss.device)
        return self._seeds[value]

    def reduce(self, step: Step) -> None:
        """Finish the step's gradient: the same on every rank, that of the loss over all its targets."""
        self._combine(step)
        if not self._checked:
            self._find_unused()
        if self._is_weighted(step):
            self._divide_by_weight(step)

    def norm(self) -> Tensor:
        """The L2 norm of the whole gradient, a 0-dim tensor on the device."""
        return nn.utils.get_total_norm(self._gradients())

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradient down to `max_norm` where it is longer; its norm before that, on the device."""
        return nn.utils.clip_grad_norm_(self._parameters.values(), max_norm)

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._parameters.values() if p.grad is not None]

    def _combine(self, step: Step) -> None:
        """Sum the ranks' gradients, if DDP has not; a gradient that no rank has stays None."""
        if self._ranks.count == 1 or not step.has_idle_rank:
            return
        parameters = list(self._parameters.values())
        for parameter, used in zip(parameters, self._used([p.grad is not None for p in parameters]), strict=True):
            if used:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                self._ranks.sum_(parameter.grad).div_(self._averaged_over)

    def _used(self, mine: list[bool]) -> list[bool]:
        """For each flag, whether any rank raises it."""
        if self._ranks.count == 1:
            return mine
        flags = torch.tensor(mine, dtype=torch.int32, device=self._ranks.device)
        return [bool(ranks) for ranks in self._ranks.sum_(flags).tolist()]

    def _is_weighted(self, step: Step) -> bool:
        """Whether targets are weighted by their values, which a rank with nothing to do cannot know by itself."""
        weighted = bool(self._weights)
        return self._used([weighted])[0] if step.has_idle_rank else weighted

    def _divide_by_weight(self, step: Step) -> None:
        """Turn a mean over the step's samples into one over its targets; no targets, no gradient."""
        weights = torch.zeros(len(step.micro_batches), dtype=torch.float64, device=self._ranks.device)
        for index, weight in self._weights:
            weights[index] = weight
        self._weights.clear()
        total = self._ranks.sum_(weights).sum()  # over the ranks each weight meets zeros: exact, in any order
        factor = torch.where(total > 0, step.size / total, torch.zeros_like(total))
        gradients = self._gradients()
        torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))

    def _find_unused(self) -> None:
        """After the run's first step: a parameter without a gradient would stall DDP, so refuse it anywhere."""
        self._checked = True
        if self._may_be_unused:
            return
        unused = [name for name, p in self._parameters.items() if p.grad is None]
        if unused:
            raise ConfigError(
                "train.find_unused_parameters",
                f"{len(unused)} parameters got no gradient in the first step ({', '.join(unused[:5])}"
                f"{', …' if len(unused) > 5 else ''}); set it to true if that is meant",
            )
