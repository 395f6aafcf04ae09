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

from trainer.distributed import Ranks
from trainer.errors import ConfigError
from trainer.plan import Step


class Gradients:
    """Scales, sums and measures gradients: `leaf` and `seed` for each micro-batch, `reduce` at the step's end."""

    def __init__(self, model: nn.Module, module: nn.Module, ranks: Ranks, *, may_be_unused: bool) -> None:
        self._model = model
        self._module = module
        self._ranks = ranks
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._check_unused = not may_be_unused
        self._weights: list[Tensor] = []
        self._seeds: dict[float, Tensor] = {}  # a few values recur; each is moved to the device once

    def model(self, step: Step) -> nn.Module:
        """What `step`'s micro-batches are run through."""
        return self._module if step.has_idle_rank else self._model

    def leaf(self, step: Step, index: int) -> AbstractContextManager[Any]:
        """The context of one micro-batch's forward and backward."""
        if self._ranks.count == 1 or step.has_idle_rank or index + 1 == step.ranks[self._ranks.rank][1]:
            return nullcontext()
        return self._ranks.accelerator.no_sync(self._model)  # type: ignore[no-any-return]

    def seed(self, step: Step, index: int, loss: Tensor, weight: Tensor | int) -> Tensor:
        """The gradient that a micro-batch's backward starts from, a 0-dim tensor: what its loss sum is divided by.

        1 / (the step's targets), times the ranks that DDP will divide by. Where the targets' weight depends on
        their values, it is not known yet: 1 / (the step's samples), and `reduce` corrects it.
        """
        if isinstance(weight, Tensor):
            self._weights.append(weight)
            value = self._ranks.count / step.size
        else:
            start, stop = step.micro_batches[index]
            value = self._ranks.count * (stop - start) / (step.size * weight)
        if value not in self._seeds:
            self._seeds[value] = torch.tensor(value, dtype=loss.dtype, device=loss.device)
        return self._seeds[value]

    def reduce(self, step: Step) -> None:
        """Finish the step's gradient: the same on every rank, that of the loss over all its targets."""
        weighted = bool(self._weights)
        if self._ranks.count > 1 and step.has_idle_rank:
            weighted = self._sum_by_hand(weighted)
        if self._check_unused:
            self._find_unused()
        if weighted:
            self._divide_by_weight(step)

    def norm(self) -> Tensor:
        """The L2 norm of the whole gradient, a 0-dim tensor on the device."""
        return nn.utils.get_total_norm(self._gradients())

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradient down to `max_norm` where it is longer; its norm before that, on the device."""
        return nn.utils.clip_grad_norm_(self._parameters.values(), max_norm)

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._parameters.values() if p.grad is not None]

    def _sum_by_hand(self, weighted: bool) -> bool:
        """What DDP does, once the backwards are over; a gradient that no rank has stays None.

        Returns whether targets are weighted, which a rank with nothing to do cannot know.
        """
        parameters = list(self._parameters.values())
        has = [*(p.grad is not None for p in parameters), weighted]
        *used, weighted_ranks = self._ranks.sum_(
            torch.tensor(has, dtype=torch.int32, device=self._ranks.device)
        ).tolist()
        for parameter, ranks in zip(parameters, used, strict=True):
            if ranks:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                self._ranks.sum_(parameter.grad).div_(self._ranks.count)
        return bool(weighted_ranks)

    def _divide_by_weight(self, step: Step) -> None:
        """Turn a mean over the step's samples into one over its targets; no targets, no gradient."""
        zero = torch.zeros((), dtype=torch.float64, device=self._ranks.device)
        total = self._ranks.sum_(sum(self._weights, zero))
        self._weights.clear()
        factor = torch.where(total > 0, step.size / total, zero)
        gradients = self._gradients()
        torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))

    def _find_unused(self) -> None:
        """After the run's first step: a parameter without a gradient would stall DDP, so refuse it anywhere."""
        self._check_unused = False
        unused = [name for name, p in self._parameters.items() if p.grad is None]
        if unused:
            raise ConfigError(
                "train.find_unused_parameters",
                f"{len(unused)} parameters got no gradient in the first step ({', '.join(unused[:5])}"
                f"{', …' if len(unused) > 5 else ''}); set it to true if that is meant",
            )
