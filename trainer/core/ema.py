"""An exponential moving average of the weights (`ema`): updated after a step, evaluated in place of the weights.

It has the parameters that are trained, those of the loss included, and the running statistics of norm layers, each
averaged alike. Everything else (frozen parameters, counters, other buffers) is the model's own. Both are the same on
every rank, and an update is elementwise, so the average is as exact as the weights are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.components.optimizer_modes import is_switched
from trainer.config.run_sections import EmaConfig
from trainer.core.run import Run
from trainer.errors import ConfigError, LockstepError
from trainer.exact.finite import first_not_finite
from trainer.exact.model_and_loss import ModelAndLoss
from trainer.exact.plan import Step
from trainer.exact.shards import is_shard, local_part, part_like, whole
from trainer.process.device import sum_dtype

STATISTICS = ("running_mean", "running_var")


class WeightAverage:
    """The average of a model's and its loss's trained tensors, on their device; of none without `ema.decay`.

    The n-th update, counting from 0, is `average = d × average + (1 - d) × weights`, where d is `ema.decay`, and with
    `ema.warmup` at most (1 + n) / (10 + n), as in TensorFlow's `ExponentialMovingAverage`. The first one copies the
    weights, as that of torch's `AveragedModel` does. Until then the average is the weights of the moment.

    With `counts_on_device`, for a run whose host does not know which steps fp16 left out, the device counts updates.
    """

    def __init__(
        self,
        section: EmaConfig,
        model: nn.Module,
        loss: nn.Module,
        *,
        device: torch.device,
        counts_on_device: bool = False,
    ) -> None:
        self.is_on = section.decay is not None
        self._decay = section.decay or 0.0
        self._section = section
        self._whole = ModelAndLoss(model, loss)
        # By name: the tensor that is trained, and its average.
        self._tensors: dict[str, tuple[Tensor, Tensor]] = {}
        self._updates = 0
        self._updates_on_device: Tensor | None = None
        if counts_on_device:
            self._updates_on_device = torch.zeros(
                (), dtype=sum_dtype(device), device=device
            )

    def begin(self) -> None:
        """Before the first step of a session, and before a state is loaded."""
        self._tensors = {}
        self.follow_thawing()

    def follow_thawing(self) -> None:
        """Hold the parameters that are trained by now. A frozen one was the same in all steps before."""
        if not self.is_on:
            return
        for name, layer in self._whole.named_norm_layers():
            for key in STATISTICS:
                self._hold(f"{name}.{key}", getattr(layer, key))
        for name, parameter in self._whole.named_parameters():
            if parameter.requires_grad:
                self._hold(name, parameter)

    def _hold(self, name: str, tensor: Tensor) -> None:
        # The tensor anew: preparing a model for several processes puts others in the place of its buffers.
        _, average = self._tensors.get(name) or (tensor, tensor.detach().clone())
        self._tensors[name] = (tensor, average)

    # ---------------------------------------------------------------- the step

    def is_due(self, step: Step) -> bool:
        """True for a step after which the average is updated. The running statistics must be the true ones then."""
        section = self._section
        return (
            self.is_on
            and step.number > section.start
            and step.number % section.every == 0
        )

    @torch.no_grad()
    def update(self, skipped: Tensor | None = None) -> None:
        """Update the average from the weights. Does not wait for the device.

        `skipped`, `(1,)`, is 1 on the device where fp16 left the step out: then nothing moves.
        """
        if self._updates_on_device is not None:
            self._update_on_device(self._updates_on_device, skipped)
            return
        if self._updates == 0:
            self._copy_weights()
        else:
            torch._foreach_lerp_(
                self._averages(),
                self._weights(),
                1.0 - self._decay_after(self._updates),
            )
        self._updates += 1

    def _decay_after(self, updates: int) -> float:
        if not self._section.warmup:
            return self._decay
        # As TensorFlow's ExponentialMovingAverage has it.
        return min(self._decay, (1 + updates) / (10 + updates))

    def _update_on_device(self, updates: Tensor, skipped: Tensor | None) -> None:
        decay = torch.full_like(updates, self._decay)
        if self._section.warmup:
            of_warmup = (1 + updates) / (10 + updates)
            decay = torch.minimum(decay, of_warmup)
        decay = torch.where(updates == 0, torch.zeros_like(decay), decay)
        if skipped is not None:
            is_skipped = skipped.reshape(()) != 0
            decay = torch.where(is_skipped, torch.ones_like(decay), decay)
            updates += (~is_skipped).to(updates.dtype)
        else:
            updates += 1
        averages = self._averages()
        weights = self._weights()
        decay = decay.to(torch.float32)
        # Exact at both ends: a decay of 1 leaves the average, and one of 0 copies the weights.
        parts = torch._foreach_mul(weights, 1 - decay)
        torch._foreach_mul_(averages, decay)
        torch._foreach_add_(averages, parts)

    # Where ranks hold parts of the parameters, they hold the same parts of the average.
    def _weights(self) -> list[Tensor]:
        return [local_part(weight) for weight, _ in self._tensors.values()]

    def _averages(self) -> list[Tensor]:
        return [local_part(average) for _, average in self._tensors.values()]

    def _copy_weights(self) -> None:
        if self._tensors:
            torch._foreach_copy_(self._averages(), self._weights())

    # ---------------------------------------------------------------- evaluation

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """A context in which the model and the loss hold the average; after it, bit for bit what they held before.

        What their running statistics become within it (`batch_norm.recalibrate`) becomes the average's. The model's
        own must be the true ones when it begins.
        """
        if not self.updates:
            with torch.no_grad():
                self._copy_weights()
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        # Values, not tensors: DDP, a compiled model and the optimizer know the model's by their addresses.
        for weight, average in zip(self._weights(), self._averages(), strict=True):
            before = weight.detach().clone()
            weight.copy_(average)
            average.copy_(before)

    # ---------------------------------------------------------------- state

    @property
    def updates(self) -> int:
        """Updates so far. Waits for the device where that counts them."""
        if self._updates_on_device is not None:
            return int(self._updates_on_device)
        return self._updates

    def tensors(self) -> dict[str, Tensor]:
        """The average by the names of what it averages, in their order, whatever was thawed when."""
        return {name: self._tensors[name][1] for name in sorted(self._tensors)}

    def state_dict(self) -> dict[str, Any]:
        """Its state, whole: a collective where ranks hold parts of it, which are then copied to the host."""
        average = {}
        for name, tensor in self.tensors().items():
            average[name] = whole(tensor).cpu() if is_shard(tensor) else tensor
        return {"updates": self.updates, "average": average}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned. Raises `LockstepError` where a tensor has another shape."""
        self._updates = int(state["updates"])
        if self._updates_on_device is not None:
            self._updates_on_device.fill_(self._updates)
        for name, value in state["average"].items():
            if name not in self._tensors:
                continue  # of a parameter that is frozen by now
            average = self._tensors[name][1]
            if average.shape != value.shape:
                raise LockstepError(
                    f"the average of {name} is {tuple(value.shape)} in the checkpoint and {tuple(average.shape)} in "
                    f"this run; use the model that the run was started with"
                )
            average.copy_(part_like(average, value) if is_shard(average) else value)

    def refuse_not_finite(self, step: int) -> None:
        """Raise `LockstepError` if the average, or this rank's part, holds NaN or an infinity. Waits for the device."""
        found = first_not_finite(self.tensors())
        if found is not None:
            raise LockstepError(
                f"the average (ema) of {found} is not finite after step {step}; nothing of it is kept. Lower "
                f"optimizer.lr, or raise train.precision"
            )


def build_average(run: Run, optimizer: Optimizer) -> WeightAverage:
    """The average that the config asks for.

    Raises `ConfigError` for an optimizer that averages weights itself.
    """
    section = run.config.ema
    if section.decay is not None and is_switched(optimizer):
        raise ConfigError(
            "ema.decay",
            f"{run.config.optimizer.name} evaluates an average of its own, and this would be one of other weights; "
            f"leave ema out, or use another optimizer",
        )
    return WeightAverage(
        section,
        run.module,
        run.task,
        device=run.ranks.device,
        counts_on_device=run.precision.skips_overflow,
    )
