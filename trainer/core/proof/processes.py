"""Do two processes make the gradient that one makes? Both are simulated here, by the run's own reduction.

Each of two ranks begins with the model as it is at the step's start and runs its own micro-batches alone. One process
runs all of them in order, so what a layer keeps from one micro-batch for the next shows.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from trainer.components.task import WeightedSum
from trainer.core.proof.compare import Difference, compare, gradients_of
from trainer.core.proof.culprit import first_to_differ
from trainer.core.proof.finding import Finding
from trainer.core.proof.state import ModuleState, without_trace
from trainer.core.proof.trial import Tolerances, Trial
from trainer.exact.batch_norm import named_norm_layers
from trainer.exact.bitwise import BitwiseReduction, Contribution
from trainer.exact.plan import Step
from trainer.exact.reduction import Reduction
from trainer.exact.standard import StandardReduction
from trainer.process.ranks import Ranks

CHECK = "processes"
# A rank's part depends on the state at the step's start and on its own micro-batches, so two show what many would do.
RANKS = 2
# In fp64 and fp32 what docs/guarantees.md promises. On a GPU a kernel may add in another order each time.
TOLERANCES = Tolerances(fp64=1e-12, fp32=1e-5, autocast=1e-2, on_gpu=1e-4)
NAMES_IN_A_MESSAGE = 3


def check_processes(trial: Trial) -> list[Finding]:
    """Run a step's first micro-batches as one rank and as two would, and compare the gradients."""
    step = trial.short_step(ranks=1)
    spans_ranks = trial.run.config.batch_norm.mode == "sync"
    if len(step.micro_batches) < RANKS or spans_ranks:
        return []  # nothing to part, or not promised
    with without_trace(trial.run, weights=True) as states:
        of_one = _gradients(trial, 1, states)
        of_two = _gradients(trial, RANKS, states)
        difference = compare(of_one, of_two, trial.tolerance(TOLERANCES))
        if difference is None:
            return []
        return [_explain(trial, difference, states)]


# ---------------------------------------------------------------- the simulation


def _gradients(
    trial: Trial, count: int, states: list[ModuleState]
) -> dict[str, Tensor | None]:
    """The gradient of the short step on `count` ranks, which take turns: the last one has what all others have left."""
    run = trial.run
    step = trial.short_step(count)
    left: list[Any] = []
    for rank in range(count):
        _begin_again(trial, states)
        ranks = SimulatedRanks(rank, count, run.ranks.device, left)
        kind = SimulatedBitwise if run.bitwise else SimulatedStandard
        reduction: Reduction = kind(
            run.module,
            run.config.batch_norm,
            cast(Ranks, ranks),
            find_unused_parameters=True,
            loss=run.task,
        )
        _run_share(trial, reduction, step, rank)
    gradients = gradients_of(run.module, run.task)
    _begin_again(trial, states)
    return gradients


def _begin_again(trial: Trial, states: list[ModuleState]) -> None:
    for state in states:
        state.restore()
    for module in (trial.run.module, trial.run.task):
        module.zero_grad()


def _run_share(trial: Trial, reduction: Reduction, step: Step, rank: int) -> None:
    reduction.begin(step)
    for index in range(*step.ranks[rank]):
        indices = (index, index + 1)

        def scale(loss: WeightedSum, indices: tuple[int, int] = indices) -> Tensor:
            return reduction.loss_scale(step, indices, *loss)

        with reduction.micro_batch(step, indices) as model:
            trial.forward_and_backward(index, model=model, scale=scale)
    reduction.finish(step)


class SimulatedRanks:
    """The ranks of a run, one after the other in one process: each adds to what the ones before it have left."""

    def __init__(
        self, rank: int, count: int, device: torch.device, left: list[Any]
    ) -> None:
        self.rank = rank
        self.count = count
        self.is_main = rank == 0
        self.device = device
        self.accelerator = SimpleNamespace(no_sync=_no_sync)
        self._left = left

    def combine(self, value: Any, add: Any) -> Any:
        """`value` of this rank with that of the rank before it, in the order of calls."""
        if not self.is_main:
            value = add(self._left.pop(0), value)
        if self.rank + 1 < self.count:
            self._left.append(value)
        return value

    def prepare(self, model: nn.Module, **_: Any) -> nn.Module:
        return model

    def broadcast_parameters(self, model: nn.Module) -> nn.Module:
        return model

    def broadcast_tensor(self, tensor: Tensor) -> None:
        """Every rank has rank 0's already."""

    def broadcast_together(self, tensors: list[Tensor], source: int) -> None:
        """The same: what a step leaves in buffers is put back after it."""

    def gather(self, items: list[Any]) -> list[Any]:
        if self.count == 1:
            return items
        result: list[Any] = self.combine(items, _concatenate)
        return result

    def sum_(self, tensor: Tensor) -> Tensor:
        if self.count == 1:
            return tensor
        return tensor.copy_(self.combine(tensor.clone(), torch.add))

    def any_rank_each(self, flags: list[bool]) -> list[bool]:
        if self.count == 1:
            return flags
        result: list[bool] = self.combine(list(flags), _any_each)
        return result


class _TakesSparse:
    """A run on one process may have sparse gradients, which ranks that take turns add up as well."""

    def _refuse_sparse_gradients(self) -> None:
        """None is refused."""


class SimulatedStandard(_TakesSparse, StandardReduction):
    """The gradient of the ranks so far, averaged as DDP does."""

    def _sum_over_ranks(self, step: Step) -> None:
        ranks = cast(SimulatedRanks, self._ranks)
        if ranks.count == 1:
            return
        gradients = [_copy(p.grad) for p in self._parameters.values()]
        total = ranks.combine(gradients, _add_each)
        if ranks.rank + 1 < ranks.count:
            return
        for parameter, gradient in zip(self._parameters.values(), total, strict=True):
            parameter.grad = None if gradient is None else gradient / ranks.count


class SimulatedBitwise(_TakesSparse, BitwiseReduction):
    """The tree of the ranks so far, without an exchange."""

    def _total(self, step: Step) -> tuple[Contribution, list[bool]]:
        ranks = cast(SimulatedRanks, self._ranks)
        is_used = ranks.any_rank_each(list(self._has_gradient.values()))
        self._add_up()
        own = list(self._tree_sum.nodes)
        if ranks.count > 1:
            nodes = ranks.combine(own, _concatenate)
            if ranks.rank + 1 < ranks.count:
                # Of no use, as the last rank has the sum; a copy, because it is scaled in place.
                _, (last,) = own[-1]
                return [tensor.clone() for tensor in last], is_used
            self._tree_sum.nodes.clear()
            for node, terms in nodes:
                self._tree_sum.push(node, terms)
            self._add_up()
        (total,) = self._tree_sum.root()
        return total, is_used


def _no_sync(_: nn.Module) -> AbstractContextManager[None]:
    return nullcontext()


def _copy(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.clone()


def _any_each(first: list[bool], second: list[bool]) -> list[bool]:
    return [one or other for one, other in zip(first, second, strict=True)]


def _add_each(
    first: list[Tensor | None], second: list[Tensor | None]
) -> list[Tensor | None]:
    sums: list[Tensor | None] = []
    for one, other in zip(first, second, strict=True):
        if one is None or other is None:
            sums.append(one if other is None else other)
        else:
            sums.append(one + other)
    return sums


def _concatenate(first: list[Any], second: list[Any]) -> list[Any]:
    return first + second


# ---------------------------------------------------------------- why they part


def _explain(
    trial: Trial, difference: Difference, states: list[ModuleState]
) -> Finding:
    """Name the layer that reads what an earlier micro-batch has left, and what that is."""
    run = trial.run
    second = trial.short_step(RANKS).ranks[1][0]

    def forward(index: int = second) -> None:
        run.forward(run.module, trial.batch(index), trial.step)

    def begin() -> None:
        _begin_again(trial, states)

    def begin_after_others() -> None:
        begin()
        for index in range(second):
            forward(index)

    part = None
    if not run.config.train.compile:  # hooks would compile it anew
        part = first_to_differ(
            run.module, forward, begin, begin_after_others, exact=trial.repeats_bits
        )
    begin_after_others()
    of_model, of_loss = states
    changes = _unknown_changes(run.module, of_model)
    if part is None and changes:
        part = "the model"
    if part is None:
        part = "the loss"
        changes = [f"loss.{name}" for name in of_loss.changes()]
    changes = [n for n in changes if n.startswith(f"{part}.")] or changes
    names = ", ".join(changes[:NAMES_IN_A_MESSAGE])
    kept = f": it changes {names}" if changes else ""
    return Finding(
        CHECK,
        f"two processes have another gradient than one, because {part} keeps something from one micro-batch for the "
        f"next{kept} ({difference})",
        "let a forward depend on its micro-batch and on what is the same at the step's start alone, and update the "
        "rest after the step, in an observer; or set batch.micro_size=batch.size, which one process can run",
    )


def _unknown_changes(module: nn.Module, state: ModuleState) -> list[str]:
    """What the forwards have changed in a model, without its running statistics, which are summed over ranks."""
    statistics = [f"{name}." for name, _ in named_norm_layers(module)]
    changes = []
    for name in state.changes():
        if not name.startswith(tuple(statistics)):
            changes.append(name)
    return changes
