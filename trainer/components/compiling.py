"""`train.compile`: a model compiled in place by torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trainer.exact.structures import map_tensors

# Modes in which torch.compile records CUDA graphs.
MODES_WITH_GRAPHS = ("reduce-overhead", "max-autotune")


def records_graphs(mode: bool | str, device_type: str) -> bool:
    return mode in MODES_WITH_GRAPHS and device_type == "cuda"


def compile_model(
    model: nn.Module, mode: bool | str, *, bitwise: bool, device: torch.device
) -> None:
    """Compile a model in place, in the mode that `train.compile` names. With `bitwise`, the kernels for a shape depend
    on that shape alone.

    By default torch.compile makes kernels for any shape once it has seen a second one, and stops making more after a
    number of shapes. Which shapes a rank sees first depends on the number of ranks.
    """
    model.compile(
        dynamic=False if bitwise else None, mode=None if mode is True else mode
    )
    if records_graphs(mode, device.type):
        keep_results_of_graphs(model)


def keep_results_of_graphs(model: nn.Module) -> None:
    """Give outputs and gradients of a compiled model memory of their own.

    A CUDA graph writes its results into the same memory each time. An output that is read at the next logged row, or a
    gradient to which that of the next micro-batch is added, would be overwritten before.
    """
    compiled: Callable[..., Any] = model._compiled_call_impl  # type: ignore[assignment]

    def call(*args: Any, **arguments: Any) -> Any:
        return map_tensors(Tensor.clone, compiled(*args, **arguments))

    model._compiled_call_impl = call
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(Tensor.clone)  # type: ignore[no-untyped-call]


def describe_compile(mode: bool | str, device_type: str) -> str:
    """A line for the header; empty where the config says it all."""
    if mode not in MODES_WITH_GRAPHS:
        return ""
    if device_type == "cuda":
        return f"{mode}: torch.compile records CUDA graphs, which have not been tried on a GPU with this trainer"
    if mode == "reduce-overhead":
        return f"reduce-overhead is what default is on {device_type}: there are no CUDA graphs"
    return f"max-autotune, without CUDA graphs on {device_type}"
