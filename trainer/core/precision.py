"""fp32, bf16, fp16 and fp64: the dtype of weights and inputs, autocast, and fp16's gradient scaler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """How a run computes. `dtype` is that of weights and inputs: fp64 in fp64, fp32 in all others.

    fp16 scales the loss so that small gradients survive (Micikevicius et al., 2018; `torch.amp.GradScaler`).
    A step whose gradient overflowed is skipped by every rank alike, as the gradient is the same on all.
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

    def backward(self, loss: Tensor, seed: Tensor) -> None:
        """Add the gradient of `loss * seed`; a seed costs less than a product and its backward."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward(seed)  # type: ignore[no-untyped-call]

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Bring the gradients to their true size, once a step, before they are looked at."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()

    def state(self) -> dict[str, Any]:
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state(self, state: dict[str, Any]) -> None:
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)
