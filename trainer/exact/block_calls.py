"""Does every forward call the same blocks? With parameters that are shared out, each call is an exchange of all ranks.

Where one rank skips a block, its next exchange would meet that of another block on the other ranks: of the same size,
it would give all of them wrong weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from trainer.errors import ConfigError
from trainer.exact.structures import tensors_in


class _Call(NamedTuple):
    """A block that was called, and whether what it gave has a gradient: else its backward gathers nothing."""

    name: str
    has_gradient: bool


class BlockCalls:
    """Compares each forward of a model with the first one in the same mode, training or not, with gradients or not.

    Raises `ConfigError` before a block is gathered out of turn. All ranks make the first forward on the same samples.
    """

    def __init__(self, module: nn.Module, blocks: Sequence[str]) -> None:
        self._expected: dict[tuple[bool, bool], list[_Call]] = {}
        self._calls: list[_Call] = []
        self._is_running = False
        module.register_forward_pre_hook(self._begin)
        for name in blocks:
            block = module.get_submodule(name)
            # Before the hook of `fully_shard`, which gathers the block.
            block.register_forward_pre_hook(partial(self._call, name), prepend=True)
            block.register_forward_hook(partial(self._called, name))
        module.register_forward_hook(self._end)

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        self._calls = []
        self._mode = (module.training, torch.is_grad_enabled())
        self._is_running = True

    def _call(self, name: str, block: nn.Module, inputs: Any) -> None:
        # Else activation checkpointing runs it again, in the backward.
        if not self._is_running:
            return
        expected = self._expected.get(self._mode)
        number = len(self._calls)
        if expected is None:
            return
        if number == len(expected) or expected[number].name != name:
            raise _other_calls(f'calls "{name}" out of turn')

    def _called(self, name: str, block: nn.Module, inputs: Any, output: Any) -> None:
        if not self._is_running:
            return
        has_gradient = any(tensor.requires_grad for tensor in tensors_in(output))
        expected = self._expected.get(self._mode)
        call = _Call(name, has_gradient)
        if expected is not None and expected[len(self._calls)] != call:
            word = "with" if has_gradient else "without"
            raise _other_calls(f'calls "{name}" {word} gradients')
        self._calls.append(call)

    def _end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._is_running = False
        expected = self._expected.setdefault(self._mode, self._calls)
        if len(self._calls) < len(expected):
            raise _other_calls(f'leaves out "{expected[len(self._calls)].name}"')


def _other_calls(what: str) -> ConfigError:
    return ConfigError(
        "train.parallel",
        f"fsdp needs every forward to call the same blocks in the same order, and one {what}, unlike the first; call "
        f"all of them, or use ddp",
    )
