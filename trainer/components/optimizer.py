"""Builds the optimizer and sets its learning rate. Its state is in `trainer.components.optimizer_state`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from trainer.components.optimizer_check import check_optimizer
from trainer.components.optimizer_on_parts import check_on_parts
from trainer.components.optimizer_parts import remember_as_built, with_inner
from trainer.components.optimizer_state import load_named_state, named_state
from trainer.components.parameter_groups import (
    IMPLEMENTATIONS,
    Group,
    check_options,
    options_of,
    parameter_groups,
)
from trainer.config.model_sections import OptimizerConfig
from trainer.config.registry import build, refuse_other_class, resolve
from trainer.errors import ConfigError
from trainer.exact.model_and_loss import ModelAndLoss

__all__ = [
    "build_optimizer",
    "learning_rates",
    "load_named_state",
    "named_state",
    "set_learning_rate",
]

OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


def build_optimizer(
    section: OptimizerConfig,
    model: nn.Module,
    *,
    head: str | None = None,
    loss: nn.Module | None = None,
) -> Optimizer:
    """The optimizer that `section` names, over the parameters of `model` and `loss` that require a gradient.

    Parameters of one learning rate (see `base_rates`; `head` is `model.head`) form a group. With
    `decay_norm_and_bias: false`, biases, other parameters of at most one dimension and all parameters of norm layers
    form further groups without weight decay; so do parameters that the model names in `no_weight_decay()`, if it is
    honoured. `groups` give further options (see `parameter_groups`). Each group keeps its base rate as `initial_lr`.
    A group with `optimizer.lr` comes first, if there is one.
    """
    whole = ModelAndLoss(model, loss)
    groups = parameter_groups(section, whole, head)
    if not groups:
        raise ConfigError(
            "model",
            "no parameter requires a gradient, so there is nothing to train; freeze less",
        )
    target = resolve("optimizer", section.name, OPTIMIZERS)
    refuse_other_class("optimizer", section.name, target, Optimizer)
    supplied = {"fused": True} if _can_be_fused(target, section.args, whole) else {}

    def make(of: list[Group], options: Mapping[str, Any]) -> Any:
        # Copies: optimizers add entries to the groups that they are given.
        own = [dict(group) for group in of]
        own_arguments = {**section.args, **options}
        # A key of the section, and so none of the component's own arguments.
        rate = own_arguments.pop("lr", section.lr)
        return build("optimizer", target, own_arguments, own, **supplied, lr=rate)

    check_optimizer(section, whole, lambda: make(groups, {}))
    optimizer: Optimizer = make(groups, {})
    if not type(optimizer).__module__.startswith("torch.optim."):
        check_on_parts(section, groups, lambda of: make(of, {}))
    remember_as_built(optimizer)
    if section.groups:
        check_options(section, optimizer, groups, make)
    _check_weight_decay(section, optimizer)
    for group in _all_groups(optimizer):
        if "lr" in group:
            group["initial_lr"] = group["lr"]
    return optimizer


def _check_weight_decay(section: OptimizerConfig, optimizer: Optimizer) -> None:
    if "weight_decay" in options_of(optimizer):
        return
    if not section.decay_norm_and_bias:
        raise ConfigError(
            "optimizer.decay_norm_and_bias",
            f'"{section.name}" has no weight_decay; leave it true',
        )
    if section.no_weight_decay == "honour":
        raise ConfigError(
            "optimizer.no_weight_decay",
            f'"{section.name}" has no weight_decay; leave it auto',
        )


def _can_be_fused(target: Any, arguments: dict[str, Any], model: ModelAndLoss) -> bool:
    """True on CUDA, for torch's own optimizers, where the config asks for no implementation.

    A fused update is one kernel for many parameters. With fp16 it also skips a step that overflowed without asking
    the host. CPUs keep torch's default: another implementation may round another way.
    """
    if target not in OPTIMIZERS.values() or IMPLEMENTATIONS & arguments.keys():
        return False
    if any(getattr(module, "sparse", False) for module in model.modules()):
        return False  # fused updates take no sparse gradients
    for parameter in model.parameters():
        fits = parameter.is_cuda and parameter.is_floating_point()
        if parameter.requires_grad and not fits:
            return False
    return True


def set_learning_rate(optimizer: Optimizer, factor: float) -> None:
    """Give each group `factor` times its base learning rate."""
    for part in with_inner(optimizer):
        for group in part.param_groups:
            if "initial_lr" in group:
                group["lr"] = group["initial_lr"] * factor


def _all_groups(optimizer: Optimizer) -> Iterator[dict[str, Any]]:
    """The groups of an optimizer, and of those that it holds: a wrapper may have copies of its own."""
    for part in with_inner(optimizer):
        yield from part.param_groups


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """`lr`, the first group's; if there are several, also `lr/<name or number>` of each."""
    groups = optimizer.param_groups
    rates = {"lr": groups[0]["lr"]}
    if len(groups) > 1:
        for number, group in enumerate(groups):
            rates[f"lr/{group.get('name', number)}"] = group["lr"]
    return rates
