"""The base learning rate of each parameter: head and backbone apart, and less for earlier layers."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from trainer.components.heads import find_head
from trainer.config.schema import OptimizerConfig

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def base_rates(section: OptimizerConfig, model: nn.Module, head: str | None) -> dict[str, float]:
    """Each parameter's learning rate before the schedule's factor; `head` is `model.head`, where it is set.

    The head has `optimizer.lr`; all else `optimizer.backbone_lr`, if that is set, times
    `optimizer.layer_decay` ** (layers after it), the head being the last (as in BEiT: Bao et al., 2022).
    """
    if section.backbone_lr is None and section.layer_decay == 1:
        return dict.fromkeys((name for name, _ in model.named_parameters()), section.lr)
    head = find_head(model, head)
    layers = layers_of(model, head)
    last = max(layers.values())
    base = section.lr if section.backbone_lr is None else section.backbone_lr
    return {
        name: section.lr if layer == last else base * section.layer_decay ** (last - layer)
        for name, layer in layers.items()
    }


def layers_of(model: nn.Module, head: str) -> dict[str, int]:
    """The layer of each parameter, counted from 0 in the order in which the model defines them; the head is the last.

    A layer is a member of an `nn.Sequential` or `nn.ModuleList` (of the innermost, where these are nested), such as
    a residual or transformer block; outside of these, any module that has parameters. Norm layers by themselves, and
    parameters directly in a module of layers (position embeddings), belong to the layer before.
    """
    layers: dict[str, int] = {}
    numbers: dict[str, int] = {}
    number = -1
    for unit in _units(model, ""):
        if unit != head:
            number += number < 0 or not isinstance(model.get_submodule(unit), NORMS)
            numbers[unit] = number
    current = 0
    for name, _ in model.named_parameters():
        if name.startswith(f"{head}."):
            continue
        current = next((numbers[unit] for unit in _ancestors(name) if unit in numbers), current)
        layers[name] = current
    last = max(layers.values(), default=-1) + 1
    return {name: layers.get(name, last) for name, _ in model.named_parameters()}


def _units(module: nn.Module, prefix: str) -> Iterable[str]:
    """The dotted names of the layers within `module`, in order."""
    for name, child in module.named_children():
        dotted = f"{prefix}{name}"
        if next(child.parameters(), None) is None:
            continue
        if _is_container(child) or (not _is_container(module) and _holds_containers(child)):
            yield from _units(child, f"{dotted}.")
        else:
            yield dotted


def _is_container(module: nn.Module) -> bool:
    return type(module) in (nn.Sequential, nn.ModuleList)


def _holds_containers(module: nn.Module) -> bool:
    """Whether layers stand within: the module has an nn.Sequential or nn.ModuleList of its own."""
    return any(_is_container(child) for child in module.children())


def _ancestors(name: str) -> list[str]:
    """The names of the modules around a parameter, the innermost first."""
    return [name.rsplit(".", cut)[0] for cut in range(1, name.count(".") + 1)]
