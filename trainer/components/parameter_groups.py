"""Parameter groups: which options of the optimizer, such as its rate and weight decay, each parameter has."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.optim import Optimizer

from trainer.components.layers import NORMS
from trainer.components.learning_rates import base_rates
from trainer.components.optimizer_parts import with_inner
from trainer.config.fields import show
from trainer.config.model_sections import OptimizerConfig
from trainer.config.trees import map_leaves
from trainer.errors import ConfigError, listed, nearest
from trainer.exact.model_and_loss import ModelAndLoss

# Arguments that choose how torch updates all parameters.
IMPLEMENTATIONS = {"fused", "foreach", "capturable", "differentiable"}
# In a group: the options that `optimizer.groups` gave it, for `optimizer_state`.
FROM_CONFIG = "from_config"
MAX_NAMES = 4  # in a message
Group = dict[str, Any]


def parameter_groups(
    section: OptimizerConfig, model: ModelAndLoss, head: str | None
) -> list[Group]:
    """The parameters that require a gradient, those of equal options together; `head` is `model.head`.

    A parameter has its rate from `base_rates`, no weight decay if it is spared, and over that the options of each of
    `optimizer.groups` whose pattern is found in its name, those of a later one over those of an earlier. Groups with
    weight decay come first, then those of `optimizer.lr`, then by rate, from high to low.

    Raises `ConfigError` for a pattern that is found in no name.
    """
    rates = base_rates(section, model.model, head)
    spared = spared_names(section, model)
    patterns = _compile(section, model)
    groups: dict[tuple[Any, ...], Group] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # A loss's own parameters have the head's rate.
        options: Group = {"lr": rates.get(name, section.lr)}
        if name in spared:
            options["weight_decay"] = 0.0
        chosen = _chosen(section, patterns, name)
        options |= chosen
        # The first group's rate is logged as `lr`. Checkpoints do not depend on the order: state is kept by name.
        order = _order(section, options)
        # 0 and 0.0 are one value.
        text = json.dumps(map_leaves(options, _as_float), sort_keys=True)
        kind = (*order, text)
        if kind not in groups:
            from_config = {FROM_CONFIG: chosen} if chosen else {}
            groups[kind] = {"params": [], **options, **from_config}
        groups[kind]["params"].append(parameter)
    # Sorting is stable: the model's order decides between groups of one rate.
    return sorted(groups.values(), key=lambda group: _order(section, group))


def _as_float(value: Any) -> Any:
    return float(value) if type(value) is int else value


def _order(section: OptimizerConfig, options: Group) -> tuple[bool, bool, float]:
    rate = options["lr"]
    return (options.get("weight_decay") == 0, rate != section.lr, -rate)


def _compile(section: OptimizerConfig, model: ModelAndLoss) -> list[re.Pattern[str]]:
    patterns = [re.compile(group["match"]) for group in section.groups]
    if not patterns:
        return []
    names = [name for name, _ in model.named_parameters()]
    for index, pattern in enumerate(patterns):
        if not any(map(pattern.search, names)):
            parts: set[str] = set()
            for name in names:
                parts.update(name.split("."))
            hint = nearest(pattern.pattern, [*names, *sorted(parts)])
            raise ConfigError(
                f"optimizer.groups[{index}].match",
                f'"{pattern.pattern}" is found in the name of no parameter; they are called '
                f"{listed(names, MAX_NAMES)}{hint}",
            )
    return patterns


def _chosen(
    section: OptimizerConfig, patterns: list[re.Pattern[str]], name: str
) -> Group:
    """What `optimizer.groups` say of the parameter `name`."""
    options: Group = {}
    for group, pattern in zip(section.groups, patterns, strict=True):
        if pattern.search(name):
            options |= {key: group[key] for key in group if key != "match"}
    return options


def check_options(
    section: OptimizerConfig,
    optimizer: Optimizer,
    groups: list[Group],
    make: Callable[[list[Group], Mapping[str, Any]], Any],
) -> None:
    """Raise `ConfigError` for options of `optimizer.groups` that the optimizer does not take, by name or by value.

    `make` builds it for some groups, with arguments over the config's own: torch checks those, and no group's entries.
    """
    known = options_of(optimizer)
    for index, group in enumerate(section.groups):
        key = f"optimizer.groups[{index}]"
        for name in group.keys() - {"match"}:
            if name in IMPLEMENTATIONS:
                raise ConfigError(
                    f"{key}.{name}",
                    f"chooses how all parameters are updated; set optimizer.{name}",
                )
            if name not in known:
                raise ConfigError(
                    f"{key}.{name}",
                    f'"{section.name}" has no such option of a group{nearest(name, known)}; it has {", ".join(known)}',
                )
    for group in groups:
        chosen = group.get(FROM_CONFIG, {})
        if chosen:
            try:
                make([{"params": group["params"]}], chosen)
            except ConfigError as error:
                raise ConfigError(
                    "optimizer.groups", f"{show(chosen)}: {error.message}"
                ) from None


def options_of(optimizer: Optimizer) -> list[str]:
    """The options that each group of the optimizer, or of one that it holds, may have."""
    options: dict[str, None] = {}
    for part in with_inner(optimizer):
        options |= dict.fromkeys(getattr(part, "defaults", {}))
    return [name for name in options if name not in IMPLEMENTATIONS]


def spared_names(section: OptimizerConfig, model: ModelAndLoss) -> set[str]:
    """Names of the parameters without weight decay: norms and biases, and those that the model names itself."""
    names: set[str] = set()
    if not section.decay_norm_and_bias:
        names |= _norms_and_biases(model)
    is_honoured = section.no_weight_decay == "honour"
    if section.no_weight_decay == "auto":
        # A config that decays norms, too, has been told to decay all.
        is_honoured = not section.decay_norm_and_bias
    if is_honoured:
        names |= named_by_model(model.model)
    return names


def _norms_and_biases(model: ModelAndLoss) -> set[str]:
    """Names of the parameters that are commonly spared weight decay."""
    in_norms: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, NORMS):
            in_norms.update(module.parameters())
    names: set[str] = set()
    for name, parameter in model.named_parameters():
        _, _, last = name.rpartition(".")
        is_bias = last == "bias"
        if is_bias or parameter.ndim <= 1 or parameter in in_norms:
            names.add(name)
    return names


def named_by_model(model: nn.Module) -> set[str]:
    """What `no_weight_decay()` of timm's models names, wildcards allowed, and Swin's `no_weight_decay_keywords()`."""
    patterns: set[str] = set()
    names = getattr(model, "no_weight_decay", None)
    if callable(names):
        patterns.update(names())
    keywords = getattr(model, "no_weight_decay_keywords", None)
    if callable(keywords):
        patterns.update(f"*{keyword}*" for keyword in keywords())
    matching: set[str] = set()
    for name, _ in model.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            matching.add(name)
    return matching


def describe_groups(
    section: OptimizerConfig, optimizer: Optimizer, model: ModelAndLoss
) -> Iterator[str]:
    """For a run's header: a line for each group, where the config has some, and one on `no_weight_decay()`."""
    if section.groups:
        groups = optimizer.param_groups
        shown = ["lr", "weight_decay"]
        for group in groups:
            shown += [key for key in group.get(FROM_CONFIG, {}) if key not in shown]
        for group in groups:
            yield _describe(group, shown)
        for index in _without_trained(section, optimizer, model):
            yield f"optimizer.groups[{index}] has no effect: all its parameters are frozen"
    names = sorted(named_by_model(model.model))
    if not names:
        return
    if set(names) <= spared_names(section, model):
        yield f"no weight decay, as the model's no_weight_decay() asks: {listed(names, MAX_NAMES)}"
    elif any(group.get("weight_decay") for group in optimizer.param_groups):
        yield (
            f"weight decay also where the model's no_weight_decay() asks for none: {listed(names, MAX_NAMES)}; "
            f"optimizer.no_weight_decay=honour spares them"
        )


def _describe(group: Group, keys: list[str]) -> str:
    count = sum(parameter.numel() for parameter in group["params"])
    # The base rate: a resumed run's is in the middle of its schedule.
    values = {**group, "lr": group["initial_lr"]}
    parts = [f"group of {count:,} parameters"]
    for key in keys:
        if key not in values:
            continue
        value = values[key]
        text = f"{value:g}" if isinstance(value, float) else show(value)
        parts.append(f"{key} {text}")
    return " · ".join(parts)


def _without_trained(
    section: OptimizerConfig, optimizer: Optimizer, model: ModelAndLoss
) -> Iterator[int]:
    trained: set[int] = set()
    for group in optimizer.param_groups:
        trained.update(map(id, group["params"]))
    names = []
    for name, parameter in model.named_parameters():
        if id(parameter) in trained:
            names.append(name)
    for index, group in enumerate(section.groups):
        if not any(re.search(group["match"], name) for name in names):
            yield index
