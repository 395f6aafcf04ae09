"""`train.compile`: a model compiled in place by torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import ConfigError, first_line
from trainer.exact.structures import map_tensors

# Whose errors are about compiling.
COMPILER_PACKAGES = ("torch._dynamo.", "torch._inductor.")
LONGEST_REASON = 300  # characters
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


def compile_failure(error: BaseException) -> ConfigError | None:
    """The message for an error of torch.compile itself, as without a C++ compiler; None for any other error."""
    # Their modules are not imported for it: where one has failed, they are there.
    modules = [kind.__module__ for kind in type(error).__mro__]
    if not any(module.startswith(COMPILER_PACKAGES) for module in modules):
        return None
    return ConfigError(
        "train.compile",
        f"torch.compile cannot compile this model here ({_reason(error)}); it needs a C++ compiler (g++, or what CXX "
        f"names) and Python's headers, on a GPU triton, too; train.compile=false trains the same without it",
    )


def _reason(error: BaseException) -> str:
    """What of an error's text tells most: a compiler's own error stands below the command that was run."""
    for line in str(error).splitlines():
        if " error: " in line:
            return line.strip()[:LONGEST_REASON]
    return first_line(error)[:LONGEST_REASON]
