"""One gradient and one set of BatchNorm statistics from the micro-batches of all ranks.

`Reduction` is what the training step drives. Its two implementations, `trainer.exact.standard` and
`trainer.exact.bitwise`, differ in how they sum; both compute what one process would.

    reduction.begin(step)
    for batch in batches:
        with reduction.micro_batch(step, batch.indices) as model:
            loss, weight = …
            loss.backward(reduction.loss_scale(step, batch.indices, loss, weight))
    reduction.finish(step)
    reduction.clip(max_norm)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from trainer.config.schema import BatchNormConfig
from trainer.errors import ConfigError
from trainer.exact.plan import IndexRange, Step
from trainer.exact.running_statistics import RunningStatistics
from trainer.process.ranks import Ranks

NAMES_IN_A_MESSAGE = 5


class Reduction(ABC):
    """Scales, sums and measures the gradient of a step, and keeps the norm layers' running statistics right.

    `module` is the model itself. What `micro_batch` gives may be a wrapper around it, such as DDP.
    """

    _ranks_averaged_over = 1  # what the sum over ranks is divided by on the way, which the loss scale undoes

    def __init__(
        self, module: nn.Module, section: BatchNormConfig, ranks: Ranks, *, find_unused_parameters: bool
    ) -> None:
        self._module = module
        self._section = section
        self._ranks = ranks
        self._find_unused_parameters = find_unused_parameters
        self._scales: dict[float, Tensor] = {}  # few values recur; each is copied to the device once
        self._build()

    def _build(self) -> None:
        self._parameters = {name: p for name, p in self._module.named_parameters() if p.requires_grad}
        self._weights: dict[int, Tensor] = {}  # by the index of a forward's first micro-batch
        self._is_first_step = True
        self._statistics = self._wrap()

    @abstractmethod
    def _wrap(self) -> RunningStatistics:
        """Make the model ready for several ranks, and return the keeper of its running statistics."""

    def rebuild(self) -> None:
        """Start anew after parameters were frozen or thawed. A collective."""
        self.gather()
        self._statistics.restore_momentum()
        self._build()

    # ---------------------------------------------------------------- one step

    def begin(self, step: Step) -> None:
        """Make ready for the step's micro-batches."""
        self._statistics.begin(step)

    @abstractmethod
    def micro_batch(self, step: Step, indices: IndexRange) -> AbstractContextManager[nn.Module]:
        """The context of one forward and backward of the micro-batches `indices`; gives the module to run."""

    def loss_scale(self, step: Step, indices: IndexRange, loss: Tensor, weight: Tensor | int) -> Tensor:
        """What a backward multiplies its loss sum by, a 0-dim tensor: 1 / (the targets of the whole step).

        Where the weight of the targets depends on their values, it is a tensor, and the step's total is not known
        yet: then this is 1 / (the samples of the step), and `finish` corrects it.
        """
        if isinstance(weight, Tensor):
            self._weights[indices[0]] = weight
            scale = self._ranks_averaged_over / step.size
        else:
            first, last = indices
            samples = step.micro_batches[last - 1][1] - step.micro_batches[first][0]
            scale = self._ranks_averaged_over * samples / (step.size * weight)
        if scale not in self._scales:
            self._scales[scale] = torch.tensor(scale, dtype=loss.dtype, device=loss.device)
        return self._scales[scale]

    def finish(self, step: Step) -> None:
        """Leave the same gradient on every rank: that of the step's loss sum over its weight. A collective."""
        self._sum_over_ranks(step)
        if self._is_first_step and not self._find_unused_parameters:
            self._refuse_unused_parameters()
        self._is_first_step = False
        if self._is_weighted_by_values(step):
            self._divide_by_weight(step)

    @abstractmethod
    def _sum_over_ranks(self, step: Step) -> None:
        """Sum the ranks' gradients, if that has not happened; a gradient that no rank has stays None."""

    # ---------------------------------------------------------------- the whole gradient

    def norm(self) -> Tensor:
        """The L2 norm of the step's gradient, a 0-dim tensor on the device."""
        return nn.utils.get_total_norm(self._gradients())

    def clip(self, max_norm: float | None) -> Tensor:
        """Scale the gradient down to `max_norm` where it is longer; returns its norm before that, on the device."""
        if max_norm is None:
            return self.norm()
        return nn.utils.clip_grad_norm_(self._parameters.values(), max_norm)

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._parameters.values() if p.grad is not None]

    # ---------------------------------------------------------------- statistics

    def gather(self) -> None:
        """Put the true running statistics on every rank, before anybody reads them. A collective."""
        self._statistics.gather()

    # ---------------------------------------------------------------- shared by both implementations

    def _is_weighted_by_values(self, step: Step) -> bool:
        is_weighted = bool(self._weights)
        # A rank with nothing to do has seen no weight and cannot know by itself.
        return self._ranks.any_rank_each([is_weighted])[0] if step.has_idle_rank else is_weighted

    def _divide_by_weight(self, step: Step) -> None:
        """Turn a mean over the step's samples into one over its targets; without targets the gradient is 0."""
        weights = torch.zeros(len(step.micro_batches), dtype=torch.float64, device=self._ranks.device)
        for index, weight in self._weights.items():
            weights[index] = weight
        self._weights.clear()
        # Over the ranks each weight meets only zeros, so this sum is exact in any order.
        total = self._ranks.sum_(weights).sum()
        factor = torch.where(total > 0, step.size / total, torch.zeros_like(total))
        gradients = self._gradients()
        torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))

    def _refuse_unused_parameters(self) -> None:
        """A parameter without a gradient would stall DDP on several ranks, so it is refused on one as well."""
        unused = [name for name, p in self._parameters.items() if p.grad is None]
        if not unused:
            return
        names = ", ".join(unused[:NAMES_IN_A_MESSAGE])
        more = ", …" if len(unused) > NAMES_IN_A_MESSAGE else ""
        raise ConfigError(
            "train.find_unused_parameters",
            f"{len(unused)} parameters got no gradient in the first step ({names}{more}); "
            f"set it to true if that is meant",
        )
