"""One gradient and one set of BatchNorm statistics from the micro-batches of all ranks.

`Reduction` is what the training step drives. Its implementations, `trainer.exact.standard`, `trainer.exact.sharded`
and `trainer.exact.bitwise`, differ in how they sum; all compute what one process would.

    reduction.begin(step)
    for batch in batches:
        with reduction.micro_batch(step, batch.indices) as model:
            loss, weight = …
            scale = reduction.loss_scale(step, batch.indices, loss, weight)
            reduction.root(loss).backward(scale)
    reduction.finish(step)
    reduction.clip(max_norm)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from trainer.config.model_sections import BatchNormConfig
from trainer.errors import ConfigError, first_few
from trainer.exact.model_and_loss import ModelAndLoss
from trainer.exact.moving_buffers import Buffer, MovingBuffers
from trainer.exact.plan import IndexRange, Step
from trainer.exact.running_statistics import RunningStatistics
from trainer.process.device import sum_dtype
from trainer.process.ranks import Ranks

NAMES_IN_A_MESSAGE = 5


class Reduction(ABC):
    """Scales, sums and measures the gradient of a step, and keeps the norm layers' running statistics right.

    `module` is the model itself. What `micro_batch` gives may be a wrapper around it, such as DDP. Parameters that the
    `loss` has are trained as the model's are, and no wrapper is around them.
    """

    # DDP's mean over ranks divides by their number, and the loss scale undoes that.
    _ranks_averaged_over = 1

    def __init__(
        self,
        module: nn.Module,
        section: BatchNormConfig,
        ranks: Ranks,
        *,
        find_unused_parameters: bool,
        loss: nn.Module | None = None,
    ) -> None:
        self._module = module
        self._loss = loss
        self._whole = ModelAndLoss(module, loss)
        if ranks.count > 1:
            # Where the loss was given from Python, ranks may have drawn other weights for it.
            for tensor in self._whole.loss_tensors():
                ranks.broadcast_tensor(tensor)
        self._section = section
        self._ranks = ranks
        self._find_unused_parameters = find_unused_parameters
        # Few values, again and again: each is copied to the device once.
        self._scales: dict[float, Tensor] = {}
        self._late_buffers: list[str] = []
        self._build()

    def _build(self) -> None:
        self._parameters: dict[str, nn.Parameter] = {}
        for name, parameter in self._whole.named_parameters():
            if parameter.requires_grad:
                self._parameters[name] = parameter
        self._loss_parameters = self._whole.trained_loss_parameters()
        self._left_out: dict[str, nn.Parameter] = {}  # of the loss: see below
        self._moving = MovingBuffers(self._whole, self._ranks)
        # By the index of a forward's first micro-batch.
        self._weights: dict[int, Tensor] = {}
        # Whether they are tensors, of the losses so far; all of a run are of one kind.
        self._kinds_of_weights: set[bool] = set()
        # The scale by the step's samples, the micro-batches and their weight, where that is a number.
        self._scales_of_counts: dict[tuple[int, IndexRange, int], Tensor] = {}
        self._is_first_step = True
        self._statistics = self._wrap()

    @abstractmethod
    def _wrap(self) -> RunningStatistics:
        """Prepare the model for several ranks, and return what updates its running statistics."""

    def rebuild(self) -> None:
        """Adapt to parameters that were frozen or thawed. A collective."""
        self.gather()
        self._statistics.restore_momentum()
        self._build()

    # ---------------------------------------------------------------- one step

    def begin(self, step: Step) -> None:
        """Prepare for the step's micro-batches."""
        self._statistics.begin(step)
        if self._moving.has_candidates:
            self._moving.begin(step)

    @abstractmethod
    def micro_batch(
        self, step: Step, indices: IndexRange
    ) -> AbstractContextManager[nn.Module]:
        """The context of one forward and backward of the micro-batches `indices`; yields the module to run."""

    def loss_scale(
        self, step: Step, indices: IndexRange, loss: Tensor, weight: Tensor | int
    ) -> Tensor:
        """The factor of this loss sum in the step's mean, a 0-dim tensor: 1 / (the targets of the whole step).

        A weight that depends on the targets' values is a tensor, and its total over the step is not known yet: then
        the factor is 1 / (the samples of the step), and `finish` corrects the gradient.
        """
        is_tensor = isinstance(weight, Tensor)
        if not isinstance(weight, Tensor):
            scale = self._scales_of_counts.get((step.size, indices, weight))
            if scale is not None:
                return scale
        first, end = indices
        if is_tensor not in self._kinds_of_weights:
            self._kinds_of_weights.add(is_tensor)
            if not self._is_first_step:
                self._refuse_mixed_weights()
        if isinstance(weight, Tensor):
            self._weights[first] = weight
            return self._scale(self._ranks_averaged_over / step.size, loss)
        start, _ = step.micro_batches[first]
        _, stop = step.micro_batches[end - 1]
        # Every sample has as many targets as those of this micro-batch.
        factor = self._ranks_averaged_over * (stop - start) / (step.size * weight)
        scale = self._scale(factor, loss)
        self._scales_of_counts[step.size, indices, weight] = scale
        return scale

    def share_scale(self, share: Tensor) -> Tensor:
        """The factor of a share of the step's mean itself, which `finish` leaves as it is, a 0-dim tensor."""
        return self._scale(float(self._ranks_averaged_over), share)

    def _scale(self, factor: float, like: Tensor) -> Tensor:
        scale = self._scales.get(factor)
        if scale is None:
            scale = self._scales[factor] = torch.tensor(
                factor, dtype=like.dtype, device=like.device
            )
        return scale

    def root(self, loss: Tensor) -> Tensor:
        """What the backward of a micro-batch starts from: the loss itself, unless others wait for parts of it."""
        return loss

    def finish(self, step: Step) -> None:
        """Leave the same gradient on every rank: that of the step's loss sum divided by its weight. A collective."""
        if self._is_first_step:
            self._refuse_sparse_gradients()
        self._sum_over_ranks(step)
        if self._moving.has_candidates:
            self._moving.finish(step)
        if self._is_first_step:
            self._check_first_step()
            self._is_first_step = False
        if self._left_out:
            self._refuse_left_out()
        if True in self._kinds_of_weights:
            self._divide_by_weight(step)

    @abstractmethod
    def _sum_over_ranks(self, step: Step) -> None:
        """Sum the ranks' gradients, unless the backward has done so. A gradient that no rank has stays None."""

    # ---------------------------------------------------------------- the whole gradient

    def norm(self) -> Tensor:
        """The L2 norm of the step's gradient, a 0-dim tensor on the device."""
        return nn.utils.get_total_norm(self.gradients())

    def clip(self, max_norm: float | None) -> Tensor:
        """Scale the gradient down to `max_norm` if it is longer; returns its norm before that, on the device."""
        if max_norm is None:
            return self.norm()
        return nn.utils.clip_grad_norm_(self._parameters.values(), max_norm)

    def gradients(self) -> list[Tensor]:
        """The gradients that there are: of the step, after `finish`."""
        gradients = []
        for parameter in self._parameters.values():
            gradient = parameter.grad
            if gradient is not None:
                gradients.append(gradient)
        return gradients

    def gradients_to_check(self) -> list[Tensor]:
        """Tensors that are finite if the step's whole gradient is: the same answer on every rank."""
        return self.gradients()

    # ---------------------------------------------------------------- statistics

    def snapshot(self) -> Callable[[], None]:
        """A function that puts every buffer back to what it is now, between two steps. A collective."""
        self.gather()
        buffers = [buffer for _, buffer in self._whole.named_buffers()]
        copies = [buffer.clone() for buffer in buffers]

        def restore() -> None:
            with torch.no_grad():
                for buffer, copy in zip(buffers, copies, strict=True):
                    buffer.copy_(copy)
            self._statistics.restart()

        return restore

    def gather(self) -> None:
        """Put the true running statistics on every rank, before anybody reads them. A collective."""
        self._statistics.gather()
        self._late_buffers += self._moving.settle()

    def gather_statistics(self) -> None:
        """As `gather`, for running statistics alone. A collective."""
        self._statistics.gather()

    @property
    def moving_buffers(self) -> list[Buffer]:
        """The buffers that forwards move, besides running statistics; known after the first step."""
        return self._moving.moving

    def take_late_buffers(self) -> list[str]:
        """The buffers found since the last call that no forward of the first step had moved."""
        names, self._late_buffers = self._late_buffers, []
        return names

    # ---------------------------------------------------------------- shared by both implementations

    def _check_first_step(self) -> None:
        """Agree on what later steps take for granted on every rank. A collective."""
        kinds = self._kinds_of_weights
        has_tensors, has_numbers = self._ranks.any_rank_each(
            [True in kinds, False in kinds]
        )
        # A rank with nothing to do has not seen any.
        kinds |= {True} if has_tensors else set()
        kinds |= {False} if has_numbers else set()
        self._refuse_mixed_weights()
        if not self._find_unused_parameters:
            self._refuse_unused_parameters()
            self._leave_out_unused_of_loss()

    def _refuse_mixed_weights(self) -> None:
        """The sum of weights over ranks is a collective, which every rank must take part in or none."""
        if len(self._kinds_of_weights) > 1:
            raise ConfigError(
                "loss.name",
                "its weight is a tensor in one micro-batch and a plain number in another; let loss_sum give the same "
                "kind always: a tensor where it depends on the targets' values",
            )

    def _divide_by_weight(self, step: Step) -> None:
        """Turn the mean over the step's samples into that over its targets; without targets the gradient is 0."""
        dtype = sum_dtype(self._ranks.device)
        count = len(step.micro_batches)
        weights = torch.zeros(count, dtype=dtype, device=self._ranks.device)
        for index, weight in self._weights.items():
            weights[index] = weight
        self._weights.clear()
        # Each weight is added to the zeros of all other ranks, so this sum is exact in any order.
        total = self._ranks.sum_(weights).sum()
        nothing = torch.zeros_like(total)
        factor = torch.where(total > 0, step.size / total, nothing)
        gradients = self.gradients()
        dtype_of_gradients = gradients[0].dtype.to_real()
        torch._foreach_mul_(gradients, factor.to(dtype_of_gradients))

    def _refuse_sparse_gradients(self) -> None:
        if self._ranks.count > 1:
            refuse_sparse_gradients(self._parameters)

    def _refuse_unused_parameters(self) -> None:
        """A parameter without a gradient would make DDP wait for ever on several ranks, so one refuses it as well."""
        unused = self._unused_parameters()
        if not unused:
            return
        names = first_few(unused, NAMES_IN_A_MESSAGE)
        raise ConfigError(
            "train.find_unused_parameters",
            f"{len(unused)} parameters got no gradient in the first step ({names}); "
            f"freeze them (model.freeze), or set it to true if that is meant",
        )

    def _unused_parameters(self) -> list[str]:
        """The model's parameters without a gradient, after the first step's backward."""
        return [
            name
            for name, p in self._parameters.items()
            if p.grad is None and name not in self._loss_parameters
        ]

    def _leave_out_unused_of_loss(self) -> None:
        """Parameters of the loss without a gradient in the first step are fixed ones, such as a teacher's."""
        for name, parameter in list(self._loss_parameters.items()):
            if parameter.grad is None:
                self._left_out[name] = self._parameters.pop(name)
                del self._loss_parameters[name]

    def _refuse_left_out(self) -> None:
        for name, parameter in self._left_out.items():
            if parameter.grad is not None:
                raise ConfigError(
                    "train.find_unused_parameters",
                    f"{name} got no gradient in the first step and has one now; set it to true",
                )


def refuse_sparse_gradients(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise `ConfigError` for a sparse gradient: ranks have other rows each. One process can train on them."""
    for name, parameter in parameters.items():
        if parameter.grad is not None and parameter.grad.layout != torch.strided:
            raise ConfigError(
                "model",
                f'the gradient of "{name}" is sparse, and processes exchange dense ones; make its embedding with '
                f"sparse=False, or train on one process",
            )
