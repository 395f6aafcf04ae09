"""Builds the optimizer, sets its learning rate, and turns its state into named tensors and numbers and back."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from trainer.components.learning_rates import NORMS, base_rates
from trainer.config.registry import build, resolve
from trainer.config.schema import OptimizerConfig
from trainer.errors import ConfigError, LockstepError

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}

Numbers = dict[str, Any]  # int, float, bool, str or None by name; under "parameters" a list of names
TRAINED = "parameters"  # no clash: every other name holds a dot
OURS = {"params", "lr", "initial_lr", "weight_decay"}  # entries of a group that the config decides


def build_optimizer(section: OptimizerConfig, model: nn.Module, *, head: str | None = None) -> Optimizer:
    """The optimizer that `section` names, over the parameters of `model` that require a gradient.

    Parameters of one learning rate (see `base_rates`; `head` is `model.head`) form a group. With
    `decay_norm_and_bias: false`, biases, other parameters of at most one dimension and all parameters of norm layers
    form further groups without weight decay. Each group keeps its base rate as `initial_lr`; the first has
    `optimizer.lr`, if any has.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise ConfigError("model", "no parameter requires a gradient, so there is nothing to train; freeze less")
    spared = set() if section.decay_norm_and_bias else _norms_and_biases(model)
    rates = base_rates(section, model, head)
    groups: list[dict[str, Any]] = []
    for extra, members in ({}, trained.keys() - spared), ({"weight_decay": 0.0}, spared):
        for rate in sorted({rates[name] for name in trained}, key=lambda rate: (rate != section.lr, -rate)):
            chosen = [p for name, p in trained.items() if name in members and rates[name] == rate]
            groups.append({"params": chosen, "lr": rate, **extra})
    target = resolve("optimizer", section.name, OPTIMIZERS)
    groups = [group for group in groups if group["params"]]
    optimizer = build("optimizer", target, section.args, groups, lr=section.lr)
    if not isinstance(optimizer, Optimizer) or "lr" not in optimizer.defaults:
        raise ConfigError("optimizer.name", f'"{section.name}" is not an optimizer with a learning rate `lr`')
    try:
        inspect.signature(optimizer.step).bind()
    except TypeError:
        raise ConfigError(
            "optimizer.name", f'"{section.name}" runs the model itself, several times a step; use another'
        ) from None
    if not section.decay_norm_and_bias and "weight_decay" not in optimizer.defaults:
        raise ConfigError("optimizer.decay_norm_and_bias", f'"{section.name}" has no weight_decay; leave it true')
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def set_learning_rate(optimizer: Optimizer, factor: float) -> None:
    """Give each group `factor` times its base learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """`lr`, the first group's; where there are several, `lr/<name or number>` of each besides."""
    groups = optimizer.param_groups
    rates = {"lr": groups[0]["lr"]}
    if len(groups) > 1:
        rates |= {f"lr/{group.get('name', number)}": group["lr"] for number, group in enumerate(groups)}
    return rates


def named_state(optimizer: Optimizer, model: nn.Module) -> tuple[dict[str, torch.Tensor], Numbers]:
    """The state as contiguous tensors and plain values, each under `<state key>.<parameter name>`.

    `model` is the module that was given to `build_optimizer`, unwrapped. What the optimizer changed in its own
    groups goes under `<key>.group <number>`. Tensors are not copied. Raises `LockstepError` for other state.
    """
    packed = optimizer.state_dict()
    names = _trained_names(optimizer, model)
    tensors: dict[str, torch.Tensor] = {}
    numbers: Numbers = {TRAINED: names}
    for index, entries in packed["state"].items():
        if not isinstance(index, int):
            raise LockstepError(f"the optimizer's state {index!r} belongs to no parameter and cannot be saved")
        for key, value in entries.items():
            _store(key, names[index], value, tensors, numbers)
    for number, group in enumerate(packed["param_groups"]):
        for key, value in group.items():
            if key not in OURS and not _same(value, optimizer.defaults.get(key)):
                _store(key, f"group {number}", value, tensors, numbers)
    return tensors, numbers


def load_named_state(
    optimizer: Optimizer, model: nn.Module, tensors: dict[str, torch.Tensor], numbers: Numbers
) -> None:
    """Put what `named_state` gave into an optimizer that `build_optimizer` made, on whatever device it is.

    Raises `LockstepError` where the parameters are not those that the state was saved for.
    """
    names = _trained_names(optimizer, model)
    _check_parameters(set(numbers.get(TRAINED, [])), set(names))
    packed = optimizer.state_dict()
    indices = {name: index for index, name in enumerate(names)}
    groups = {f"group {number}": group for number, group in enumerate(packed["param_groups"])}
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *numbers.items()]:
        key, _, owner = name.partition(".")
        if owner in indices:
            state.setdefault(indices[owner], {})[key] = value
        elif owner in groups:
            groups[owner][key] = value
        elif name != TRAINED:
            raise LockstepError(f'the saved optimizer state "{name}" belongs to no parameter of this run')
    optimizer.load_state_dict({**packed, "state": state})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entries in state.items():
        _restore_exactly(parameters[index], optimizer.state[parameters[index]], entries)


def _norms_and_biases(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay is commonly kept from."""
    in_norms = {id(p) for module in model.modules() if isinstance(module, NORMS) for p in module.parameters()}
    return {
        name
        for name, parameter in model.named_parameters()
        if id(parameter) in in_norms or parameter.ndim <= 1 or name.rpartition(".")[2] == "bias"
    }


def _trained_names(optimizer: Optimizer, model: nn.Module) -> list[str]:
    """The names of the optimizer's parameters, in its own order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _store(key: Any, owner: str, value: Any, tensors: dict[str, torch.Tensor], numbers: Numbers) -> None:
    name = f"{key}.{owner}"
    if not isinstance(key, str) or "." in key:
        raise LockstepError(f'the optimizer\'s state "{name}" cannot be saved: its key must be text without a dot')
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().contiguous()
    elif value is None or isinstance(value, bool | int | float | str):
        numbers[name] = value
    else:
        kind = type(value).__name__
        raise LockstepError(f'the optimizer\'s state "{name}" is a {kind}; only tensors and plain values can be saved')


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, torch.Tensor) or isinstance(other, torch.Tensor):
        return value is other
    return bool(value == other)


def _check_parameters(saved: set[str], present: set[str]) -> None:
    for names, problem in ((present - saved, "lacks"), (saved - present, "has")):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
            what = f"the saved optimizer state {problem} {shown}"
            raise LockstepError(f"{what}, unlike this run; train the parameters that were trained then")


def _restore_exactly(parameter: nn.Parameter, loaded: dict[str, Any], saved: dict[str, Any]) -> None:
    """Undo what torch's loading does beside moving tensors: casts to the parameter's dtype, sharing, spoilt text."""
    for key, value in saved.items():
        if not isinstance(value, torch.Tensor):
            loaded[key] = value
        else:
            like = parameter if value.shape == parameter.shape else value  # strides as the parameter's
            loaded[key] = torch.empty_like(like, dtype=value.dtype, device=loaded[key].device).copy_(value)
