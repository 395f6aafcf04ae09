"""Every block takes part in every backward. With parameters that are shared out, a block's backward is an exchange.

A loss may leave out what some blocks have computed, and another micro-batch's loss may not. Autograd would pass such
blocks over on one rank, while the others wait for it to gather them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.exact.structures import tensors_in


class BlockOutputs:
    """Ties what the blocks of a model, and the model itself, give in training to the loss.

    Gradients stay as they are: those that a tie passes on are undefined, which adds nothing. Autograd takes the last
    operation of a forward first, so all ranks reach the blocks in the same order.
    """

    def __init__(self, module: nn.Module, blocks: Sequence[str]) -> None:
        self._ends: list[Tensor] = []
        self._is_expected = False
        self._is_running = False
        module.register_forward_pre_hook(self._begin)
        for name in blocks:
            module.get_submodule(name).register_forward_hook(self._note)
        module.register_forward_hook(self._end)

    def begin(self) -> None:
        """Take note of the forwards from now on, until `tie`."""
        self._ends.clear()
        self._is_expected = True

    def tie(self, loss: Tensor) -> Tensor:
        """The loss, with a graph that has the outputs of all forwards since `begin`."""
        ends, self._ends = self._ends, []
        self._is_expected = False
        tied: Tensor = _Tie.apply(loss, *ends)
        return tied

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        self._is_running = self._is_expected and torch.is_grad_enabled()

    def _note(self, part: nn.Module, inputs: Any, output: Any) -> None:
        # Activation checkpointing runs blocks again, in the backward.
        if not self._is_running:
            return
        outputs = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
        if outputs:
            self._ends.append(_End.apply(*outputs))

    def _end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._note(module, inputs, output)
        self._is_running = False


class _End(torch.autograd.Function):
    """An empty tensor whose graph has that of the arguments, and which keeps none of their memory."""

    @staticmethod
    def forward(ctx: Any, *outputs: Tensor) -> Tensor:
        ctx.count = len(outputs)
        return outputs[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return (None,) * ctx.count


class _Tie(torch.autograd.Function):
    """The loss, which alone gets a gradient; but the backward goes through the graphs of all arguments."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *ends: Tensor) -> Tensor:
        ctx.count = len(ends)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, *[None] * ctx.count
