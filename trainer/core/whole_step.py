"""The loss of all outputs of a step at once, for tasks that say `whole_step = True`: contrastive and metric learning.

A loss that compares samples is another one for every cut of a step into micro-batches, unless it sees all of them. So
a step runs its micro-batches twice (Gao et al., 2021, "Scaling deep contrastive learning batch size under memory
limited setup"):

1. without a graph, for the outputs of all micro-batches of all ranks. Every rank joins them in the order of the
   samples and computes the step's loss, and its gradient with respect to each output;
2. with a graph, micro-batch by micro-batch, which passes those gradients on to the parameters.

Both passes draw the same, because draws are keyed by step and micro-batch. The first one leaves no trace in any
buffer. The loss sees the same tensors on any number of ranks, so its bits are the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trainer.components.task import Task, WeightedSum
from trainer.core.metrics import Meter
from trainer.core.precision import check_gradient
from trainer.core.run import Run
from trainer.data.batches import MicroBatch
from trainer.errors import ConfigError
from trainer.exact.model_and_loss import ModelAndLoss
from trainer.exact.moving_buffers import Copies, other_buffers
from trainer.exact.plan import Step
from trainer.exact.reduction import Reduction
from trainer.exact.structures import map_tensors, tensors_in
from trainer.exact.whole_outputs import Part, join_step, rows_of
from trainer.process.activity import COMPUTING, EXCHANGING, activity

# Between the outputs of both passes, relative: far above rounding, far below another draw.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
TOLERANCE_OF_AUTOCAST = 5e-2  # bf16 has 8 significant bits, fp16 has 11
NAMES_IN_A_MESSAGE = 5


class WholeStep:
    """Both passes of the steps of a run. `reduction` and `meter` are those that the training step drives.

    For each step: `begin`, then `forward_and_backward` for each of this rank's micro-batches, then `finish`.
    """

    def __init__(self, run: Run, reduction: Reduction, meter: Meter) -> None:
        self._run = run
        self._reduction = reduction
        self._meter = meter
        self._whole = ModelAndLoss(run.module, run.task)
        self._is_first = True
        self._differences: list[Tensor] = []

    def begin(self, step: Step, batches: Iterable[MicroBatch]) -> list[MicroBatch]:
        """The first pass over this rank's micro-batches, which are returned for the second; then the loss.

        Counts the loss and the metrics of the step in the meter, once over all ranks. A collective. Raises
        `ConfigError` where outputs or targets cannot be joined by sample.
        """
        self._step = step
        own = list(batches)
        outputs = self._first_pass(step, own)
        targets = [Part(batch.indices, batch.targets) for batch in own]
        activity.mark(EXCHANGING)
        self._output = join_step(self._run.ranks, step, outputs)
        whole_targets = join_step(self._run.ranks, step, targets)
        activity.mark(COMPUTING)
        whole = MicroBatch(0, None, whole_targets, samples=step.size)
        self._loss = self._differentiate(whole)
        if self._run.ranks.is_main:  # which runs the step's first micro-batch
            self._meter.add(whole, self._output, self._loss)
        return own

    def forward_and_backward(
        self, model: nn.Module, batch: MicroBatch
    ) -> tuple[Any, WeightedSum]:
        """The second pass of a micro-batch: its output, and the step's loss for the first one, else a loss of zero."""
        output = self._run.forward.train_output(model, batch, self._step)
        rows = rows_of(self._step, batch.indices)
        if self._is_first:
            self._compare(output, rows)
        share = self._share(output, rows)
        self._run.precision.backward(share, self._reduction.share_scale(share))
        is_first = batch.first == 0
        return output, self._loss if is_first else self._zero_loss()

    def finish(self) -> None:
        """After the first step, refuse a model whose second pass gave other outputs. A collective then."""
        del self._output, self._gradients, self._of_loss
        if self._is_first:
            self._is_first = False
            self._run.ranks.on_each(self._check_passes)

    # ---------------------------------------------------------------- the first pass

    @torch.no_grad()
    def _first_pass(self, step: Step, batches: list[MicroBatch]) -> list[Part]:
        """The outputs; every micro-batch starts from the buffers that the step begins with, and those come back."""
        parts = []
        copies = Copies(other_buffers(self._whole, norms=True))
        for batch in batches:
            try:
                output = self._run.forward.train_output(self._run.module, batch, step)
            finally:
                copies.restore()
            parts.append(Part(batch.indices, output))
        return parts

    # ---------------------------------------------------------------- the loss

    def _differentiate(self, whole: MicroBatch) -> WeightedSum:
        """The step's loss; notes the gradient of its mean for each output, and for each parameter of the loss."""
        leaves = []
        for tensor in tensors_in(self._output):
            is_real = tensor.is_floating_point() or tensor.is_complex()
            leaves.append(tensor.requires_grad_() if is_real else tensor)
        with torch.enable_grad():
            loss = self._run.forward.whole_loss(
                self._run.module, self._output, whole, self._step
            )
        check_gradient(loss.total)
        own = self._whole.trained_loss_parameters()
        # The model's, too, in the first step: a loss that reaches them by itself is refused.
        model = {}
        if self._is_first:
            for name, parameter in self._run.module.named_parameters():
                if parameter.requires_grad:
                    model[name] = parameter
        asked = [leaf for leaf in leaves if leaf.requires_grad]
        gradients = torch.autograd.grad(
            loss.total,
            [*asked, *own.values(), *model.values()],
            grad_outputs=_one_over(loss),
            allow_unused=True,
        )
        # In the order in which they were asked for.
        remaining = iter(gradients)
        self._gradients = []
        for leaf in leaves:
            gradient = next(remaining) if leaf.requires_grad else None
            self._gradients.append(gradient)
        self._of_loss = []
        for parameter in own.values():
            gradient = next(remaining)
            if gradient is not None:
                self._of_loss.append((parameter, gradient))
        used = []
        for name, gradient in zip(model, remaining, strict=True):
            if gradient is not None:
                used.append(name)
        if used:
            raise _reaches_model(used)
        self._output = map_tensors(Tensor.detach, self._output)
        return WeightedSum(loss.total.detach(), loss.weight)

    def _share(self, output: Any, rows: slice) -> Tensor:
        """A sum whose gradient is this micro-batch's share of that of the step's mean."""
        terms = []
        for tensor, gradient in zip(tensors_in(output), self._gradients, strict=True):
            if gradient is not None and tensor.requires_grad:
                terms.append((tensor * gradient[rows]).sum())
        if rows.start == 0:
            # What the loss itself has: once over all ranks, with the step's first micro-batch.
            terms += [
                (parameter * gradient).sum() for parameter, gradient in self._of_loss
            ]
        if not terms:
            return self._loss.total.new_zeros(())
        return torch.stack(terms).sum()

    def _zero_loss(self) -> WeightedSum:
        total, weight = self._loss
        zero = weight.new_zeros(()) if isinstance(weight, Tensor) else 0
        return WeightedSum(total.new_zeros(()), zero)

    # ---------------------------------------------------------------- the same twice?

    @torch.no_grad()
    def _compare(self, output: Any, rows: slice) -> None:
        for tensor, first in zip(
            tensors_in(output), tensors_in(self._output), strict=True
        ):
            if not tensor.is_floating_point():
                continue
            before = first[rows]
            distance = (tensor - before).double().norm()
            self._differences.append(distance / before.double().norm().clamp(min=1e-30))

    def _check_passes(self) -> None:
        """Raise `ConfigError` if the second pass gave other outputs. Waits for the device."""
        if not self._differences:
            return
        largest = float(torch.stack(self._differences).max())
        self._differences = []
        precision = self._run.precision
        bound = TOLERANCE[precision.dtype]
        if precision.autocasts:
            bound = TOLERANCE_OF_AUTOCAST
        if largest > bound:  # NaN is no difference: the step's own checks find it
            raise ConfigError(
                "loss.name",
                f"whole_step runs each micro-batch twice, and the second time the model gave other outputs (relative "
                f"difference {largest:.1e}), so the gradient would not be that of the loss; let it draw from torch's "
                f"global generators, and keep what it remembers in buffers",
            )


def build_whole_step(run: Run, reduction: Reduction, meter: Meter) -> WholeStep | None:
    """What runs a step whose loss is of all its outputs at once; None for other tasks."""
    if not run.task.whole_step:
        return None
    return WholeStep(run, reduction, meter)


def _one_over(loss: WeightedSum) -> Tensor:
    """1 / (the step's targets), and 0 where it has none: then the gradient is 0."""
    weight = torch.as_tensor(loss.weight).to(loss.total)
    return torch.where(weight > 0, 1 / weight, torch.zeros_like(weight))


def _reaches_model(names: list[str]) -> ConfigError:
    listed = ", ".join(names[:NAMES_IN_A_MESSAGE])
    return ConfigError(
        "loss.name",
        f"whole_step passes the gradient on through outputs, and loss_sum uses parameters of the model itself "
        f"({listed}); make them parameters of the task, or use them in predict",
    )


class SumOfOutputs(Task):
    """In the place of a `whole_step` task where micro-batches are compared one by one and at once.

    Its loss adds up over samples, and any difference of an output changes it.
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task

    def predict(self, model: nn.Module, inputs: Any) -> Any:
        """As the task does."""
        return self.task.predict(model, inputs)

    def predict_with_targets(self, model: nn.Module, inputs: Any, targets: Any) -> Any:
        """As the task does."""
        return self.task.predict_with_targets(model, inputs, targets)

    def loss_sum(self, output: Any, targets: Any) -> WeightedSum:
        """Each value counts by its place within its sample."""
        terms = []
        rows = 0
        for tensor in tensors_in(output):
            if tensor.is_floating_point() and tensor.dim():
                values = tensor.flatten(1) if tensor.dim() > 1 else tensor.unsqueeze(1)
                positions = torch.arange(values.shape[1], device=values.device)
                # No two places weigh the same, so outputs that trade places are noticed.
                weights = positions.to(values).add(1).cos()
                terms.append((values * weights).sum())
                rows = len(tensor)
        return WeightedSum(torch.stack(terms).sum(), rows)


def loss_by_sample(task: Task) -> Task:
    """The task; for one whose loss is of a whole step, a stand-in whose loss adds up over samples."""
    return SumOfOutputs(task) if task.whole_step else task


def describe_scope(run: Run) -> str:
    """Which samples the loss compares, for the run's header; "" for a loss of each sample by itself."""
    if run.task.whole_step:
        return "over all outputs of a step at once, in two passes"
    if run.task.compares_samples:
        size = run.plan.micro_size
        return (
            f"compares the samples of a micro-batch ({size} at most) and no others: another batch.micro_size is "
            f"another loss"
        )
    return ""
