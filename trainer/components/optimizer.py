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
from trainer.exact.model_and_loss import LOSS_PREFIX, ModelAndLoss

OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}

# By name an int, float, bool, str or None; under PARAMETERS a list of names.
Numbers = dict[str, Any]
# Arguments that choose how torch updates.
IMPLEMENTATIONS = {"fused", "foreach", "capturable", "differentiable"}
PARAMETERS = "parameters"  # cannot clash: every other name has a dot
# A group's entries that come from the config.
CONFIG_ENTRIES = {"params", "lr", "initial_lr", "weight_decay"}


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
    form further groups without weight decay. Each group keeps its base rate as `initial_lr`. A group with
    `optimizer.lr` comes first, if there is one.
    """
    whole = ModelAndLoss(model, loss)
    groups = _groups(section, whole, head)
    if not groups:
        raise ConfigError(
            "model",
            "no parameter requires a gradient, so there is nothing to train; freeze less",
        )
    target = resolve("optimizer", section.name, OPTIMIZERS)
    supplied = {"fused": True} if _can_be_fused(target, section.args, whole) else {}
    optimizer = build(
        "optimizer", target, section.args, groups, lr=section.lr, **supplied
    )
    if not isinstance(optimizer, Optimizer) or "lr" not in optimizer.defaults:
        raise ConfigError(
            "optimizer.name",
            f'"{section.name}" is not an optimizer with a learning rate `lr`',
        )
    # LBFGS and its like want a closure that runs the model again, which a step of micro-batches cannot offer.
    try:
        inspect.signature(optimizer.step).bind()
    except TypeError:
        raise ConfigError(
            "optimizer.name",
            f'"{section.name}" runs the model itself, several times a step; use another',
        ) from None
    if not section.decay_norm_and_bias and "weight_decay" not in optimizer.defaults:
        raise ConfigError(
            "optimizer.decay_norm_and_bias",
            f'"{section.name}" has no weight_decay; leave it true',
        )
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def _can_be_fused(target: Any, arguments: dict[str, Any], model: ModelAndLoss) -> bool:
    """True on CUDA, for torch's own optimizers, where the config asks for no implementation.

    A fused update is one kernel for many parameters. With fp16 it also skips a step that overflowed without asking
    the host. CPUs keep torch's default: another implementation may round another way.
    """
    if target not in OPTIMIZERS.values() or IMPLEMENTATIONS & arguments.keys():
        return False
    if any(getattr(module, "sparse", False) for module in model.modules()):
        return False  # fused updates take no sparse gradients
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return all(
        parameter.is_cuda and parameter.is_floating_point() for parameter in trained
    )


def _groups(
    section: OptimizerConfig, model: ModelAndLoss, head: str | None
) -> list[dict[str, Any]]:
    """Parameter groups: those with weight decay first, then by rate: `optimizer.lr`, then from high to low."""
    rates = base_rates(section, model.model, head)
    without_decay = set() if section.decay_norm_and_bias else _norms_and_biases(model)
    groups: dict[tuple[bool, bool, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = rates.get(name, section.lr)  # a loss's own have the head's
        # The first group's rate is logged as `lr`. Checkpoints do not depend on the order: state is kept by name.
        order = (name in without_decay, rate != section.lr, -rate)
        if order not in groups:
            groups[order] = {"params": [], "lr": rate}
            if name in without_decay:
                groups[order]["weight_decay"] = 0.0
        groups[order]["params"].append(parameter)
    return [groups[order] for order in sorted(groups)]


def set_learning_rate(optimizer: Optimizer, factor: float) -> None:
    """Give each group `factor` times its base learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """`lr`, the first group's; if there are several, also `lr/<name or number>` of each."""
    groups = optimizer.param_groups
    rates = {"lr": groups[0]["lr"]}
    if len(groups) > 1:
        for number, group in enumerate(groups):
            rates[f"lr/{group.get('name', number)}"] = group["lr"]
    return rates


def named_state(
    optimizer: Optimizer, model: nn.Module, loss: nn.Module | None = None
) -> tuple[dict[str, torch.Tensor], Numbers]:
    """The state as contiguous tensors and plain values, each under `<state key>.<parameter name>`.

    `model` and `loss` are the modules that were passed to `build_optimizer`, unwrapped. What the optimizer changed in
    its own groups goes under `<key>.group <number>`. Tensors are not copied. Raises `LockstepError` for state of any
    other kind.
    """
    # torch numbers parameters by their position in the groups, which changes with the config; names do not.
    packed = optimizer.state_dict()
    names = _trained_names(optimizer, ModelAndLoss(model, loss))
    tensors: dict[str, torch.Tensor] = {}
    numbers: Numbers = {PARAMETERS: names}
    for index, entries in packed["state"].items():
        if not isinstance(index, int):
            raise LockstepError(
                f"the optimizer's state {index!r} belongs to no parameter and cannot be saved"
            )
        for key, value in entries.items():
            _store(key, names[index], value, tensors, numbers)
    for number, group in enumerate(packed["param_groups"]):
        for key, value in group.items():
            if key not in CONFIG_ENTRIES and not _same(
                value, optimizer.defaults.get(key)
            ):
                _store(key, f"group {number}", value, tensors, numbers)
    return tensors, numbers


def load_named_state(
    optimizer: Optimizer,
    model: nn.Module,
    tensors: dict[str, torch.Tensor],
    numbers: Numbers,
    loss: nn.Module | None = None,
) -> None:
    """Load what `named_state` returned into an optimizer from `build_optimizer`, on whatever device it is.

    Raises `LockstepError` if the parameters are not those that the state was saved for.
    """
    whole = ModelAndLoss(model, loss)
    names = _trained_names(optimizer, whole)
    saved_names = set(numbers.get(PARAMETERS, []))
    if any(name.startswith(LOSS_PREFIX) for name in saved_names):
        _check_parameters(saved_names, set(names))
    else:  # as in a checkpoint from before losses were trained
        _check_parameters(
            saved_names, {name for name in names if not name.startswith(LOSS_PREFIX)}
        )
    packed = optimizer.state_dict()
    entries_of: dict[str, dict[str, Any]] = {}  # by parameter or group
    for name in names:
        entries_of[name] = {}
    for number, group in enumerate(packed["param_groups"]):
        entries_of[f"group {number}"] = group
    for name, value in (tensors | numbers).items():
        if name == PARAMETERS:
            continue
        key, _, owner = name.partition(".")
        if owner not in entries_of:
            raise LockstepError(
                f'the saved optimizer state "{name}" belongs to no parameter of this run'
            )
        entries_of[owner][key] = value
    packed["state"] = {
        index: entries_of[name] for index, name in enumerate(names) if entries_of[name]
    }
    optimizer.load_state_dict(packed)
    parameters = dict(whole.named_parameters())
    for name in names:
        if entries_of[name]:  # looking up an optimizer's state would make an empty one
            _restore_exactly(
                parameters[name], optimizer.state[parameters[name]], entries_of[name]
            )


def _norms_and_biases(model: ModelAndLoss) -> set[str]:
    """Names of the parameters that are commonly spared weight decay."""
    in_norms: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, NORMS):
            in_norms.update(module.parameters())
    names: set[str] = set()
    for name, parameter in model.named_parameters():
        is_bias = name.rpartition(".")[2] == "bias"
        if is_bias or parameter.ndim <= 1 or parameter in in_norms:
            names.add(name)
    return names


def _trained_names(optimizer: Optimizer, model: ModelAndLoss) -> list[str]:
    """The names of the optimizer's parameters, in its own order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        names[id(parameter)]
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]


def _store(
    key: Any, owner: str, value: Any, tensors: dict[str, torch.Tensor], numbers: Numbers
) -> None:
    name = f"{key}.{owner}"
    if not isinstance(key, str) or "." in key:
        raise LockstepError(
            f'the optimizer\'s state "{name}" cannot be saved: its key must be text without a dot'
        )
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().contiguous()
    elif value is None or isinstance(value, bool | int | float | str):
        numbers[name] = value
    else:
        kind = type(value).__name__
        raise LockstepError(
            f'the optimizer\'s state "{name}" is a {kind}; only tensors and plain values can be saved'
        )


def _same(value: Any, other: Any) -> bool:
    # Comparing tensors would wait for the device, and be no bool if they have several elements.
    if isinstance(value, torch.Tensor) or isinstance(other, torch.Tensor):
        return value is other
    return bool(value == other)


def _check_parameters(saved: set[str], present: set[str]) -> None:
    for names, verb in ((present - saved, "lacks"), (saved - present, "has")):
        if names:
            examples = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
            raise LockstepError(
                f"the saved optimizer state {verb} {examples}, unlike this run; train the parameters that were "
                f"trained then"
            )


def _restore_exactly(
    parameter: nn.Parameter, loaded: dict[str, Any], saved: dict[str, Any]
) -> None:
    """Undo what torch's loading does besides moving tensors: it casts to the parameter's dtype and spoils text."""
    for key, value in saved.items():
        if not isinstance(value, torch.Tensor):
            loaded[key] = value
            continue
        strides_from = parameter if value.shape == parameter.shape else value
        copy = torch.empty_like(
            strides_from, dtype=value.dtype, device=loaded[key].device
        )
        loaded[key] = copy.copy_(value)
