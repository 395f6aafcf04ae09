"""fp32, bf16, fp16 and fp64: the dtype of weights and inputs, autocast, and fp16's gradient scaler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.components.optimizer_step import update
from trainer.core.autograd_engine import backward
from trainer.errors import ConfigError
from trainer.exact.structures import map_tensors

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """The precision of a run. `dtype` is that of weights and inputs: fp64 in fp64, fp32 in all others.

    fp16 scales the loss so that small gradients do not become 0 (Micikevicius et al., 2018; `torch.amp.GradScaler`).
    All ranks have the same gradient, so all skip a step whose gradient overflowed.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.dtype = torch.float64 if name == "fp64" else torch.float32
        self.scaler = torch.amp.GradScaler(device.type) if name == "fp16" else None
        self._device_type = device.type
        self._autocast = AUTOCAST.get(name)

    @property
    def autocasts(self) -> bool:
        return self._autocast is not None

    def autocast(self) -> torch.autocast:
        """The context of a forward in bf16 or fp16."""
        return torch.autocast(self._device_type, self._autocast)

    def without_autocast(self, output: Any) -> Any:
        """A model's output, of whatever structure, with every floating tensor in the run's dtype.

        A loss summed in bf16 loses digits, one in fp16 soon overflows.
        """
        if isinstance(output, Tensor):
            return self._raise(output)
        return map_tensors(self._raise, output)

    def _raise(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def backward(self, loss: Tensor, loss_scale: Tensor) -> None:
        """Add the gradient of `loss * loss_scale`. Raises `ConfigError` for a loss without one."""
        if not loss.requires_grad:
            check_gradient(loss)
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        # As the gradient of the loss itself, the factor costs less than a product and its backward.
        backward(loss, loss_scale)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Bring the gradients to their true size. Call it at most once a step, before anything reads them."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    @property
    def skips_overflow(self) -> bool:
        """True where a gradient that is not finite is part of the method: fp16 skips the step and scales less."""
        return self.scaler is not None

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update the weights, unless fp16 overflowed."""
        if self.scaler is None:
            update(optimizer)
        else:
            self.scaler.step(optimizer)
            self.scaler.update()

    def state(self) -> dict[str, Any]:
        """The scaler's state, for a checkpoint; {} without a scaler."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state(self, state: dict[str, Any]) -> None:
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)


def check_gradient(loss: Tensor) -> None:
    """Raise `ConfigError` for a loss that no parameter can be trained by."""
    if not loss.requires_grad:
        raise ConfigError(
            "loss.name",
            "the loss has no gradient: it must be computed from the model's output by differentiable operations (no "
            "argmax, .item(), .detach() or NumPy), and some parameter must be trained",
        )
