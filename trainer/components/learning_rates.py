"""The base learning rate of each parameter: one for the head, one for the backbone, less for earlier layers."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from trainer.components.heads import find_head, parent_names
from trainer.config.schema import OptimizerConfig

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def base_rates(
    section: OptimizerConfig, model: nn.Module, head: str | None
) -> dict[str, float]:
    """Each parameter's learning rate before the schedule's factor; `head` is `model.head`, if it is set.

    The head has `optimizer.lr`. Everything else has `optimizer.backbone_lr` (if that is not set, `optimizer.lr`) times
    `optimizer.layer_decay` ** (number of layers after it), counting the head as the last (BEiT: Bao et al., 2022).
    """
    if section.backbone_lr is None and section.layer_decay == 1:
        return {name: section.lr for name, _ in model.named_parameters()}
    layers = layers_of(model, find_head(model, head))
    last = max(layers.values())
    backbone_lr = section.lr if section.backbone_lr is None else section.backbone_lr
    rates: dict[str, float] = {}
    for name, layer in layers.items():
        rates[name] = (
            section.lr
            if layer == last
            else backbone_lr * section.layer_decay ** (last - layer)
        )
    return rates


def layers_of(model: nn.Module, head: str) -> dict[str, int]:
    """The layer of each parameter, counted from 0 in the order in which the model defines them; the head is the last.

    A layer is a member of an `nn.Sequential` or `nn.ModuleList` (of the innermost, if these are nested), such as a
    residual or transformer block; outside of these, any module with parameters. Norm layers by themselves, and
    parameters directly in a module of layers (position embeddings), belong to the layer before.
    """
    number_of_unit: dict[str, int] = {}
    number = -1
    for unit in _units(model, ""):
        if unit == head:
            continue
        # A norm between layers would otherwise push everything before it one step of `layer_decay` further down.
        is_norm = isinstance(model.get_submodule(unit), NORMS)
        if number < 0 or not is_norm:
            number += 1
        number_of_unit[unit] = number
    layers: dict[str, int] = {}
    in_head: list[str] = []
    current = 0
    for name, _ in model.named_parameters():
        if name.startswith(f"{head}."):
            in_head.append(name)
            continue
        # A parameter outside every unit, such as a position embedding, takes the layer of the one before it.
        current = next(
            (
                number_of_unit[unit]
                for unit in parent_names(name)
                if unit in number_of_unit
            ),
            current,
        )
        layers[name] = current
    last = max(layers.values(), default=-1) + 1
    return layers | dict.fromkeys(in_head, last)


def _units(module: nn.Module, prefix: str) -> Iterator[str]:
    """The dotted names of the layers within `module`, in order."""
    for name, child in module.named_children():
        if next(child.parameters(), None) is None:
            continue
        holds_layers = not _is_container(module) and any(
            _is_container(part) for part in child.children()
        )
        if _is_container(child) or holds_layers:
            yield from _units(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _is_container(module: nn.Module) -> bool:
    return type(module) in (nn.Sequential, nn.ModuleList)
