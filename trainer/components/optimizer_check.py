"""What is wrong with an optimizer, found before the first step: it needs a closure, or cannot be saved.

torch's own are known. Any other is tried once on the run's own parameters, with zero gradients: a step, its state saved
and loaded into a second one. The parameters are put back, and the optimizer that tried is thrown away.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from trainer.components.optimizer_modes import is_switched
from trainer.components.optimizer_state import load_named_state, named_state
from trainer.config.model_sections import OptimizerConfig
from trainer.errors import ConfigError, LockstepError
from trainer.exact.model_and_loss import ModelAndLoss
from trainer.exact.seeding import preserved_cpu_generators

# Arguments of torch's own optimizers that not every device, or no training loop, takes.
TRIED_ARGUMENTS = {"capturable", "differentiable", "fused", "foreach"}
# Those that update from the gradients of an embedding with `sparse=True`.
TAKES_SPARSE = ("SGD", "Adagrad", "SparseAdam")


def check_optimizer(
    section: OptimizerConfig, model: nn.Module | ModelAndLoss, make: Callable[[], Any]
) -> None:
    """Raise `ConfigError`, on the key at fault, unless what `make` returns can train `model`, be saved and resumed."""
    optimizer = make()
    has_rate = isinstance(optimizer, Optimizer) and all(
        "lr" in group for group in optimizer.param_groups
    )
    if not has_rate:
        raise ConfigError(
            "optimizer.name",
            f'"{section.name}" is not an optimizer with a learning rate `lr`',
        )
    _check_step(section, optimizer)
    _check_parameters(section, optimizer, model)
    _check_sparse(section, optimizer, model)
    is_torchs = type(optimizer).__module__.startswith("torch.optim.")
    if not is_torchs or TRIED_ARGUMENTS & section.args.keys():
        _try(section, optimizer, model, make)


def _check_step(section: OptimizerConfig, optimizer: Optimizer) -> None:
    """Refuse LBFGS and its like: they want a closure that runs the model again, which micro-batches cannot offer."""
    problem = (
        f'"{section.name}" runs the model itself, several times a step; use another'
    )
    try:
        inspect.signature(optimizer.step).bind()
    except TypeError:
        raise ConfigError("optimizer.name", problem) from None
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError("optimizer.name", problem)


def _check_parameters(
    section: OptimizerConfig, optimizer: Optimizer, model: nn.Module | ModelAndLoss
) -> None:
    own = {id(parameter) for parameter in model.parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in own:
                raise ConfigError(
                    "optimizer.name",
                    f'"{section.name}" has put a tensor {tuple(parameter.shape)} in its groups that is no parameter of '
                    f"the model",
                )


def _check_sparse(
    section: OptimizerConfig, optimizer: Optimizer, model: nn.Module | ModelAndLoss
) -> None:
    sparse: set[int] = set()
    for module in model.modules():
        if getattr(module, "sparse", False):
            sparse.update(map(id, module.parameters(recurse=False)))
    kind = type(optimizer).__name__
    is_torchs = type(optimizer).__module__.startswith("torch.optim.")
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or not is_torchs:
            continue
        if kind == "SparseAdam" and id(parameter) not in sparse:
            raise ConfigError(
                "optimizer.name",
                f'"{section.name}" takes the gradients of embeddings with sparse=True alone, and that of {name} is '
                f"dense; use adam",
            )
        if kind == "SGD" and section.args.get("momentum") and id(parameter) in sparse:
            raise ConfigError(
                "optimizer.momentum",
                f"{name} has a sparse gradient, whose momentum no checkpoint can hold; make its embedding with "
                f"sparse=False, or set momentum to 0",
            )
        if kind not in TAKES_SPARSE and id(parameter) in sparse:
            raise ConfigError(
                "optimizer.name",
                f'"{section.name}" takes no sparse gradient, and {name} has one; make its embedding with sparse=False',
            )


def _try(
    section: OptimizerConfig,
    optimizer: Optimizer,
    model: nn.Module | ModelAndLoss,
    make: Callable[[], Any],
) -> None:
    with _untouched(model), preserved_cpu_generators():
        try:
            if is_switched(optimizer):
                optimizer.train()  # type: ignore[attr-defined]
            optimizer.step()
        except Exception as error:
            # A step that needs a closure fails in many ways.
            raise ConfigError(
                "optimizer.name",
                f'"{section.name}" cannot take a step here: {_describe(error)}; a step is called without a closure, '
                f"once for each update",
            ) from None
        try:
            load_named_state(make(), model, *named_state(optimizer, model))
        except Exception as error:
            reason = (
                str(error) if isinstance(error, LockstepError) else _describe(error)
            )
            raise ConfigError(
                "optimizer.name",
                f'"{section.name}" cannot be saved and resumed: {reason}',
            ) from None


@contextmanager
def _untouched(model: nn.Module | ModelAndLoss) -> Iterator[None]:
    """A context in which the parameters have zero gradients; after it, values and gradients are what they were."""
    before = [(p, p.detach().clone(), p.grad) for p in model.parameters()]
    for parameter, value, _ in before:
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value, gradient in before:
                parameter.copy_(value)
                parameter.grad = gradient


def _describe(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
