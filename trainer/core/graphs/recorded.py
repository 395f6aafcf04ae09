"""One micro-batch that was recorded: its forward, loss and backward, for every batch of one layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from trainer.components.task import WeightedSum
from trainer.core.graphs.exchange import RefuseExchange
from trainer.core.graphs.layout import NotRecordable
from trainer.core.proof.state import without_trace
from trainer.core.run import Run
from trainer.data.batches import MicroBatch
from trainer.exact.model_and_loss import ModelAndLoss
from trainer.exact.plan import Step
from trainer.exact.reduction import Reduction
from trainer.exact.structures import map_tensors, tensors_in
from trainer.process.cuda_graph import Recorder

COMPARISONS = 3  # of the first replays with eager


@contextmanager
def unseen(run: Run, buffers: Sequence[Tensor]) -> Iterator[None]:
    """A context that leaves no trace, not even in the versions of buffers, by which forwards are counted."""
    with (
        _unsafe_preserve_version_counter(tuple(buffers)),
        without_trace(run),
    ):
        yield


class Recorded:
    """A micro-batch as a graph, on tensors of its own.

    `example` gives the layout, `like` the dtype of losses. Raises `NotRecordable`, or what the recording raises.

    Attributes: `comparisons_left`, how many of the next replays are to be compared with eager.
    """

    def __init__(
        self, run: Run, recorder: Recorder, example: MicroBatch, like: Tensor
    ) -> None:
        self.comparisons_left = COMPARISONS
        self._run = run
        whole = ModelAndLoss(run.module, run.task)
        self.parameters = [p for p in whole.parameters() if p.requires_grad]
        self.buffers = [buffer for _, buffer in whole.named_buffers()]
        self._batch = _copy_of(example)
        self._scale = torch.ones_like(like)
        versions = [buffer._version for buffer in self.buffers]
        without_exchange: AbstractContextManager[object] = nullcontext()
        if run.ranks.count > 1:
            without_exchange = RefuseExchange()
        with unseen(run, self.buffers), without_exchange:
            results, self._replay = recorder.record(self._compute)
            moved = [buffer._version for buffer in self.buffers]
        self._output, self._loss, gradients = results
        # Each buffer as often as a forward moves its version, as far as torch marks what it writes.
        self._moves: list[Tensor] = []
        for buffer, before, after in zip(self.buffers, versions, moved, strict=True):
            self._moves += [buffer] * (after - before)
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is not None:
                _check_gradient(gradient)
                self._gradients.append((parameter, gradient))

    def _compute(self) -> tuple[Any, WeightedSum, tuple[Tensor | None, ...]]:
        """What is recorded. Gradients are handed over, so that each replay gives those of its micro-batch alone."""
        output, loss = self._run.forward.seeded(self._run.module, self._batch)
        gradients = torch.autograd.grad(
            loss.total, self.parameters, self._scale, allow_unused=True
        )
        # Without the graph of autograd, whose nodes would live on.
        output = map_tensors(Tensor.detach, output)
        return output, WeightedSum(loss.total.detach(), loss.weight), gradients

    def run(
        self, reduction: Reduction, batch: MicroBatch, step: Step
    ) -> tuple[Any, WeightedSum]:
        """What eager leaves and returns, without a graph of autograd."""
        result = self.replay(reduction, batch, step)
        if self._moves:
            torch.autograd.graph.increment_version(self._moves)
        return result

    @torch.no_grad()
    def replay(
        self, reduction: Reduction, batch: MicroBatch, step: Step
    ) -> tuple[Any, WeightedSum]:
        """The same without marking buffers as moved."""
        torch._foreach_copy_(_tensors_of(self._batch), _tensors_of(batch))
        total, weight = self._loss
        # Its value is not known yet, and the scale does not depend on it.
        own_weight = torch.empty_like(weight) if isinstance(weight, Tensor) else weight
        scale = reduction.loss_scale(step, batch.indices, total, own_weight)
        self._scale.copy_(scale)
        self._run.forward.seed(batch, step)
        self._replay()
        # The next replay overwrites its results.
        if isinstance(weight, Tensor) and isinstance(own_weight, Tensor):
            own_weight.copy_(weight)
        self._add_gradients()
        output = map_tensors(Tensor.clone, self._output)
        return output, WeightedSum(total.clone(), own_weight)

    def _add_gradients(self) -> None:
        """Do to `grad` what a backward does."""
        copies: list[tuple[Tensor, Tensor]] = []
        additions: list[tuple[Tensor, Tensor]] = []
        for parameter, gradient in self._gradients:
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
                copies.append((parameter.grad, gradient))
            else:
                additions.append((parameter.grad, gradient))
        if copies:
            targets, sources = zip(*copies, strict=True)
            torch._foreach_copy_(targets, sources)
        if additions:
            targets, sources = zip(*additions, strict=True)
            torch._foreach_add_(targets, sources)


def _copy_of(batch: MicroBatch) -> MicroBatch:
    return batch._replace(
        inputs=map_tensors(Tensor.clone, batch.inputs),
        targets=map_tensors(Tensor.clone, batch.targets),
        source=None,
    )


def _tensors_of(batch: MicroBatch) -> list[Tensor]:
    return [*tensors_in(batch.inputs), *tensors_in(batch.targets)]


def _check_gradient(gradient: Tensor) -> None:
    if gradient.layout != torch.strided:
        raise NotRecordable("a gradient is sparse")
