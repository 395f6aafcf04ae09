"""The reduction of standard mode for a model whose parameters are shared out over the ranks (`train.parallel=fsdp`).

torch's `fully_shard` sums a block's gradient over the ranks in the backward of every micro-batch, and leaves each rank
its part; so no rank ever holds the whole gradient. Like DDP it takes the mean over ranks, which the loss scale undoes.

Forwards and backwards are collectives here: a rank that ran fewer of them would leave the others waiting. The plan says
how many the busiest rank runs in a step, and every other rank makes up for what it lacks by empty ones, which change
no gradient, no buffer and no sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trainer.exact.block_outputs import BlockOutputs
from trainer.exact.moving_buffers import Copies, other_buffers
from trainer.exact.plan import IndexRange, Step
from trainer.exact.reduction import Reduction
from trainer.exact.running_statistics import RunningStatistics, StatisticsShare
from trainer.exact.shards import blocks_in, is_shard, local_part


class ShardedReduction(Reduction):
    """As `StandardReduction`, for a model that `trainer.exact.sharding.shard` has shared out.

    `run_empty` runs one micro-batch of the step forward and backward with a loss of zero. Gradients are this rank's
    parts.
    """

    _statistics: StatisticsShare

    # Set before the first step.
    run_empty: Callable[[Step], None]

    def _wrap(self) -> RunningStatistics:
        self._ranks_averaged_over = self._ranks.count
        self._use = _UseOfParameters(self._module)
        self._outputs = BlockOutputs(self._module, blocks_in(self._module))
        return StatisticsShare(self._module, self._section, self._ranks, self._loss)

    def micro_batch(
        self, step: Step, indices: IndexRange
    ) -> AbstractContextManager[nn.Module]:
        if self._statistics.is_on:
            self._statistics.micro_batch(indices)
        if self._moving.has_candidates:
            self._moving.micro_batch()
        self._outputs.begin()
        return nullcontext(self._module)

    def root(self, loss: Tensor) -> Tensor:
        # One without a graph stays so: it is refused, as on one process.
        return self._outputs.tie(loss) if loss.requires_grad else loss

    def finish(self, step: Step) -> None:
        if self._statistics.is_on:
            self._statistics.end_micro_batch()
        self._keep_up(step)
        if self._statistics.is_on:
            self._statistics.finish(step)
        super().finish(step)

    def _sum_over_ranks(self, step: Step) -> None:
        """Nothing to do: the backwards have summed."""

    def _keep_up(self, step: Step) -> None:
        """Run as many empty micro-batches as this rank lacks, before any other collective."""
        first, end = step.ranks[self._ranks.rank]
        missing = max(stop - start for start, stop in step.ranks) - (end - first)
        if not missing:
            return
        buffers = Copies(other_buffers(self._whole, norms=True))
        for _ in range(missing):
            self._outputs.begin()
            self.run_empty(step)
            buffers.restore()

    # ---------------------------------------------------------------- the gradient, in parts

    def gradients(self) -> list[Tensor]:
        return [local_part(gradient) for gradient in super().gradients()]

    def gradients_to_check(self) -> list[Tensor]:
        """One number, the same on every rank, which is finite if the whole gradient is. A collective."""
        parts = self.gradients()
        largest = torch.zeros(1, dtype=parts[0].dtype, device=self._ranks.device)
        # An empty tensor has no largest value.
        parts = [part for part in parts if part.numel()]
        if parts:
            largest += torch.stack(torch._foreach_norm(parts, math.inf)).sum()
        return [self._ranks.sum_(largest)]

    def norm(self) -> Tensor:
        norms = torch._foreach_norm(self.gradients())
        squares = torch.stack([norm.square() for norm in norms]).sum()
        return self._ranks.sum_(squares).sqrt()

    def clip(self, max_norm: float | None) -> Tensor:
        norm = self.norm()
        if max_norm is not None:
            # As `torch.nn.utils.clip_grads_with_norm_`, which does not take parts together with a whole norm.
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(self.gradients(), factor)
        return norm

    # ---------------------------------------------------------------- parameters without a gradient

    def _unused_parameters(self) -> list[str]:
        """Those that no rank has used. A collective."""
        names = list(self._parameters)
        is_used = self._ranks.any_rank_each([name in self._use.names for name in names])
        self._use.end()
        return [name for name, used in zip(names, is_used, strict=True) if not used]


class _UseOfParameters:
    """Notes which parameters get a gradient, until `end`: once it is reduced, one that got none has zeros as well."""

    def __init__(self, module: nn.Module) -> None:
        self.names: set[str] = set()
        self._handles: list[RemovableHandle] = []
        self._watched: set[str] = set()
        for path, part in module.named_modules():
            # After the hook of `fully_shard`, which gathers the part.
            watch = partial(self._watch, f"{path}." if path else "")
            self._handles.append(part.register_forward_pre_hook(watch))

    def _watch(self, prefix: str, part: nn.Module, inputs: Any) -> None:
        for key, parameter in part.named_parameters():
            name = prefix + key
            if is_shard(parameter) or name in self._watched:
                continue
            if parameter.requires_grad:
                self._watched.add(name)
                note = partial(self._note, name)
                hook = parameter.register_post_accumulate_grad_hook(note)  # type: ignore[no-untyped-call]
                self._handles.append(hook)

    def _note(self, name: str, parameter: Tensor) -> None:
        # A backward passes through what no loss uses as well (`BlockOutputs`), and leaves no gradient there.
        if parameter.grad is not None:
            self.names.add(name)

    def end(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
